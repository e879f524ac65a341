from peftlib.methods.unified.propetl.method import ProPETL, ProPETLConfig

__all__ = ["ProPETL", "ProPETLConfig"]

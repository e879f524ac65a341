from peftlib.methods.hybrid.automatic.autopeft.method import AutoPEFT, AutoPEFTConfig

__all__ = ["AutoPEFT", "AutoPEFTConfig"]

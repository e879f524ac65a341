from peftlib.methods.hybrid.automatic.s3delta.method import S3Delta, S3DeltaConfig

__all__ = ["S3Delta", "S3DeltaConfig"]

"""One dtype, enforced."""

from lightning_trainer.precision.single_dtype import DtypeError, SingleDtypePrecision

__all__ = ["DtypeError", "SingleDtypePrecision"]

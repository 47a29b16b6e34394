"""Networks that find shot boundaries in video: TransNetV2 and AutoShot."""

from iv2_jax.models.shots.network import (
    ZOO,
    ShotConfig,
    ShotLayer,
    ShotNet,
    ShotOutput,
    make_predict,
)

__all__ = ["ZOO", "ShotConfig", "ShotLayer", "ShotNet", "ShotOutput", "make_predict"]

"""A server of multiprocessing that has imported what its processes need, so that each of them takes little time."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        *(
            f"nnunet_vit_mae.{name}"
            for name in ("nnunet.pretraining", "datasets.crop.cropping", "datasets.convert.sources")
        ),
        *("nnunet_vit_mae.datasets.convert.conversion", "nnunet_vit_mae.pretraining.run", "torch._dynamo"),
        *("matplotlib.pyplot", "pydicom", "pytest", "scipy.ndimage"),
    ]
)

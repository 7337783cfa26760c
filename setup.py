"""Only what `pyproject.toml` cannot say: two folders of the repository live inside the installed package.

`trainers/` is what nnU-Net's `nnUNet_extTrainer` points to, `plans/` holds the recipes. Both stand at the top of the
repository, where a reader finds them, and are installed as `nnunet_vit_mae.trainers` and `nnunet_vit_mae.plans`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nnunet_vit_mae*"]), "nnunet_vit_mae.trainers", "nnunet_vit_mae.plans"],
    package_dir={"nnunet_vit_mae.trainers": "trainers", "nnunet_vit_mae.plans": "plans"},
    package_data={
        "nnunet_vit_mae": ["py.typed"],
        "nnunet_vit_mae.plans": ["*.json"],
        "nnunet_vit_mae.evaluation": ["*.j2"],
        "nnunet_vit_mae.sharing": ["*.j2"],
        "nnunet_vit_mae.study": ["*.j2", "Snakefile"],
    },
)

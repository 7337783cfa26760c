"""nnU-Net plugin: a 3D vision transformer, pre-trained by masked autoencoding on one's own scans.

The functions behind the commands are imported from here, each when it is first used, so that commands answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunet_vit_mae.calibration.cases import CalibrationCase as CalibrationCase
    from nnunet_vit_mae.calibration.cases import Classes as Classes
    from nnunet_vit_mae.calibration.thresholds import fit_thresholds as fit_thresholds
    from nnunet_vit_mae.errors import UserError as UserError
    from nnunet_vit_mae.evaluation.cases import find_evaluation_set as find_evaluation_set
    from nnunet_vit_mae.evaluation.results import EvaluationOptions as EvaluationOptions
    from nnunet_vit_mae.evaluation.summary import evaluate as evaluate
    from nnunet_vit_mae.networks.build import build_segmenter as build_segmenter
    from nnunet_vit_mae.nnunet.models import find_model as find_model
    from nnunet_vit_mae.nnunet.plans import load_plan as load_plan
    from nnunet_vit_mae.nnunet.pretraining import Machine as Machine
    from nnunet_vit_mae.nnunet.pretraining import pretrain as pretrain
    from nnunet_vit_mae.nnunet.quantification import find_scans_to_quantify as find_scans_to_quantify
    from nnunet_vit_mae.nnunet.quantification import quantify as quantify
    from nnunet_vit_mae.settings import Network as Network
    from nnunet_vit_mae.weights import PretrainedEncoder as PretrainedEncoder
    from nnunet_vit_mae.weights import load_encoder as load_encoder

__version__ = "0.1.0"

API = {  # of each name, in the order of the work
    "load_plan": "nnunet.plans",
    "pretrain": "nnunet.pretraining",
    "Machine": "nnunet.pretraining",
    "load_encoder": "weights",
    "PretrainedEncoder": "weights",
    "build_segmenter": "networks.build",
    "Network": "settings",
    "fit_thresholds": "calibration.thresholds",
    "CalibrationCase": "calibration.cases",
    "Classes": "calibration.cases",
    "find_evaluation_set": "evaluation.cases",
    "evaluate": "evaluation.summary",
    "EvaluationOptions": "evaluation.results",
    "find_model": "nnunet.models",
    "find_scans_to_quantify": "nnunet.quantification",
    "quantify": "nnunet.quantification",
    "UserError": "errors",
}


def __getattr__(name: str) -> Any:
    if name not in API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{API[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *API})

"""What published models need before they are trained, so that nothing of it shows only when the trained model is written."""

from __future__ import annotations

from collections.abc import Callable
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel

from trapo_train.schema import refused


def make_savable(model: PreTrainedModel, tell: Callable[[str], None]) -> None:
    """Have the configurations of a model pass the checks of transformers, which come when they are saved, by saving them once.

    Many a generation_config of the hub has a temperature or top_p without do_sample, which is loaded, but not saved: by some
    versions of transformers never, by others (5.23) not once it was changed, as model.eos_token changes it.

    Raises: UserError for a configuration that cannot be saved all the same.
    """
    with TemporaryDirectory() as folder:
        if model.can_generate():
            try:
                model.generation_config.save_pretrained(folder)
            except ValueError:
                model.generation_config.do_sample = True
                tell(
                    "the model's generation_config has settings of sampling and no do_sample: true, which transformers does not "
                    "save; the trained model gets do_sample: true"
                )
        remedy = "Mend its config.json or generation_config.json in a copy of the model"
        with refused(f"model: transformers must be able to save the configuration of the model. {remedy}", ValueError):
            model.config.save_pretrained(folder)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)

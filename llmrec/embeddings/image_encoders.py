"""Vision models of transformers as encoders of pictures: CLIP, SigLIP and their kin, ViT, DINOv2.

An encoder turns RGB pictures into float32 [n, D]. It knows nothing of items, files or caches; `image.py` does.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.embeddings.text_encoders import EncoderSettings
from llmrec.embeddings.weights import refuse_random_weights
from llmrec.errors import MissingPartError, SettingsError
from llmrec.pretrained import PretrainedSource

if TYPE_CHECKING:
    from PIL import Image


class ImageEncoder:
    """A vision model with its image processor.

    Which vector of a picture is taken: the projected image features where the model has them (`get_image_features` of
    CLIP and SigLIP, the `image_embeds` of CLIP's vision half); else the pooled output; else, also where a checkpoint
    comes without the weights of its pooler (a ViT that was trained as a classifier), the last hidden state of the
    first token. Nothing is normalised.

    Pictures are prepared with Pillow, also where torchvision is installed: the same vectors on every machine.

    Args:
        source: The model's files.
        settings: dtype, device and revision are used.

    Raises:
        MissingPartError: The files hold no image processor, or lack weights.
        SettingsError: A model that doesn't take pictures.
    """

    def __init__(self, source: PretrainedSource, settings: EncoderSettings):
        import torch
        import transformers

        hub = {"revision": settings.revision} if source.is_hub_id else {}
        config = transformers.AutoConfig.from_pretrained(source.path, **hub)
        try:
            self._processor = transformers.AutoImageProcessor.from_pretrained(source.path, backend="pil", **hub)
        except (OSError, ValueError) as error:
            raise MissingPartError(
                f"{source.path} has no image processor (preprocessor_config.json) that can be loaded: choose a vision"
                f" model such as CLIP, SigLIP, ViT or DINOv2 ({str(error).splitlines()[0]})"
            ) from error
        architecture = next(iter(config.architectures or ()), "")
        # AutoModel would leave out the projection of CLIP's vision half
        projected = architecture.endswith("VisionModelWithProjection")
        model_class: Any = getattr(transformers, architecture) if projected else transformers.AutoModel
        self._model, loading = model_class.from_pretrained(
            source.path, dtype=getattr(torch, settings.dtype), output_loading_info=True, **hub
        )
        missing = loading["missing_keys"]
        self._random_pooler = any(name.startswith("pooler.") for name in missing)
        refuse_random_weights(missing, source.path, unused=("pooler.",))
        self._name = source.path
        self._model = self._model.to(settings.resolved_device).eval()

    def prepare(self, picture: "Image.Image") -> Mapping[str, Any]:
        """What the model takes of one RGB picture of any size, tensors [1, ...]; safe to call in several threads."""
        # transformers 5.17 would take a picture three pixels high for one with its channels first.
        return dict(self._processor(images=[picture], return_tensors="pt", input_data_format="channels_last"))

    def encode(self, prepared: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """float32 [len(prepared), D].

        Args:
            prepared: Results of `prepare`, at least one.

        Raises:
            SettingsError: The model gives something else than one vector a picture.
        """
        import torch

        inputs = {}
        for name in prepared[0]:
            tensor = torch.cat([one[name] for one in prepared]).to(self._model.device)
            inputs[name] = tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor
        with torch.inference_mode():
            features = self._features(inputs)
        if not isinstance(features, torch.Tensor) or features.shape != (len(prepared), features[0].numel()):
            raise SettingsError(
                f"{self._name} gives no single vector a picture: choose a vision model such as CLIP, SigLIP, ViT or"
                " DINOv2"
            )
        return features.float().cpu().numpy()

    def _features(self, inputs: Mapping[str, Any]) -> Any:
        if hasattr(self._model, "get_image_features"):
            output = self._model.get_image_features(**inputs)
            return getattr(output, "pooler_output", output)
        output = self._model(**inputs)
        if getattr(output, "image_embeds", None) is not None:
            return output.image_embeds
        if getattr(output, "pooler_output", None) is not None and not self._random_pooler:
            return output.pooler_output.flatten(1)  # [B, D, 1, 1] of convolutional models
        return output.last_hidden_state[:, 0]  # [B, T, D]

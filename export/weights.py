"""The weights of f as a .safetensors file, by torchvision's or timm's names for them, without a classifier."""

import json

from safetensors.torch import save

from training.encoders import Encoder, ForeignEncoder


def weights_file(encoder: Encoder, architecture: str) -> bytes:
    """The content of the file. With its metadata, h = network((x - mean) / std) - centre for x (N, 3, S, S) in [0, 1],
    or with a tensor `whitening` (d, d) in it, h = network((x - mean) / std) @ whitening - centre.

    architecture  as in the model card
    The metadata are texts: `architecture`, and JSON lists of numbers: `mean` and `std` (3), `centre` (d).
    """
    is_foreign = isinstance(encoder, ForeignEncoder)
    network = encoder.network if is_foreign else encoder
    mean, std = (encoder.mean, encoder.std) if is_foreign else ([0.0] * 3, [1.0] * 3)
    numbers = {"mean": mean, "std": std, "centre": encoder.centre}
    metadata = {name: json.dumps([float(value) for value in values]) for name, values in numbers.items()}
    # save() refuses tensors that share their memory
    tensors = {
        name: value.cpu().clone().contiguous() for name, value in network.state_dict().items() if name != "centre"
    }
    if encoder.whitening is not None:  # the state dict of another network lacks it
        tensors["whitening"] = encoder.whitening.cpu().clone().contiguous()
    return save(tensors, {"format": "pt", "architecture": architecture, **metadata})

"""Generated pictures for benchmarks: JPEG files of 500 x 375 and about 95 KB, similar to ImageNet's."""

import io

import numpy as np
from PIL import Image

WIDTH, HEIGHT, QUALITY = 500, 375, 90


def jpeg(seed: int, width: int = WIDTH, height: int = HEIGHT) -> bytes:
    """A JPEG file of coloured blobs with grain, which compress like photographs."""
    random = np.random.default_rng(seed)
    blobs = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((width, height))
    grain = random.normal(0, 16, (height, width, 1))
    out = io.BytesIO()
    Image.fromarray((np.asarray(blobs) + grain).clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()

"""The operators' Python side: loading, fake, autograd, autocast, reference implementation and packing.

Importing this package registers everything; it must stay cheap, because `import fxsparse` imports it.
"""

from fxsparse.ops import library

library.load()

from fxsparse.ops import conv2d as conv2d  # noqa: E402 - registers on top of the loaded schemas
from fxsparse.ops import conv2d_tiled as conv2d_tiled  # noqa: E402 - likewise
from fxsparse.ops import run_region as run_region  # noqa: E402 - likewise

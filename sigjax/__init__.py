"""SigLIP-style image-text models in JAX.

The losses are here for other trainers, too: see docs/loss.md. Importing this
package imports JAX, but no data loading and no checkpoints.
"""

from sigjax.losses import ring_sigmoid_loss, sigmoid_loss

__all__ = ["ring_sigmoid_loss", "sigmoid_loss"]
__version__ = "0.2.0"

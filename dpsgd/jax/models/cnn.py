"""The small CNN of the digits."""

from flax import nnx

from dpsgd.models import ModelSpec


class CNN(nnx.Module):
    """Two convolutions with GroupNorm; flattened channels first, as torch does."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs):
        side = spec.image_size // 2
        self.conv1 = nnx.Conv(spec.channels, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.GroupNorm(16, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.GroupNorm(32, num_groups=4, epsilon=1e-5, rngs=rngs)
        self.linear = nnx.Linear(32 * side * side, spec.num_classes, rngs=rngs)

    def __call__(self, x):
        """[P, H, W, C] to logits [P, classes]."""
        x = nnx.max_pool(nnx.relu(self.norm1(self.conv1(x))), (2, 2), (2, 2))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.linear(x.transpose(0, 3, 1, 2).reshape(len(x), -1))

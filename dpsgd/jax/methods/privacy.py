"""jax-privacy's ``clipped_grad``, as released: vmap(grad), clip, sum; padding by its own mask."""

from jax_privacy import clipping

from dpsgd.jax.step import JaxStep


class JaxPrivacy(JaxStep):
    """Its public API, one call per physical batch; noise and optimizer are the shared ones."""

    def _sum_and_norms(self, params, clip_norm, inputs, targets, mask):
        gradient = clipping.clipped_grad(
            lambda params, inputs, targets: self.objective(params, inputs, targets)[0],
            l2_clip_norm=clip_norm,
            batch_argnums=(1, 2),
            return_grad_norms=True,
        )
        total, aux = gradient(params, inputs, targets, is_padding_example=~mask)
        return total, aux.grad_norms * mask

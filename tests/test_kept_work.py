"""What a run does so that no work is lost: what it saves, keeps, and goes on from."""

import jax.numpy as jnp
import optax
import pytest
import tiny_runs
from tiny_runs import LinearModel, run

from vit22b_transfer import NotFiniteError
from vit22b_transfer.checkpoints import reading
from vit22b_transfer.partitioning.rules import Partitioning

# --- What is not finite ---


def turned(step, value):
    """An optimizer whose update of `step` (from 1) moves every parameter by `value`."""

    def scale(count):
        return jnp.where(count == step - 1, value, -1e-2)

    return optax.scale_by_schedule(scale)


@pytest.mark.parametrize(
    "partitioning", [tiny_runs.ONE_DEVICE, Partitioning(data=4, model=2)]
)
def test_parameters_that_an_update_made_nan_replace_no_checkpoint(
    partitioning, tmp_path
):
    # Saved at step 10, whose loss and gradients are of the parameters before it.
    model = LinearModel(turned(10, jnp.nan))
    with pytest.raises(NotFiniteError) as error:
        run(tmp_path, model, partitioning=partitioning)
    message = str(error.value)
    assert "after step 10" in message and "checkpoint_5 is untouched" in message
    assert "target/decoder/kernel" in message and "and 1 more (of 4 arrays)" in message
    assert reading.complete_steps(str(tmp_path)) == [5]
    assert not run(tmp_path, LinearModel(turned(99, 0.0))).interrupted


def test_an_optimizer_state_that_is_not_finite_is_not_saved(tmp_path):
    def init(params):
        return {"trace": jnp.zeros(3), "best": jnp.inf}

    def update(updates, state, params=None):
        spoiled = {**state, "trace": state["trace"] + jnp.inf}
        return optax.tree.scale(-1e-2, updates), spoiled

    model = LinearModel(optax.GradientTransformation(init, update))
    with pytest.raises(NotFiniteError, match=r"in state/param_states/trace \(of 5 ar"):
        run(tmp_path, model)
    assert reading.complete_steps(str(tmp_path)) == []

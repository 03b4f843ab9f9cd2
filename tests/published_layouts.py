"""Whether the tensors of a published model all map, at any size: none is allocated."""

from vit22b_transfer import UserError
from vit22b_transfer.weights import mapping
from vit22b_transfer.weights.transforms import abstract


def check_layout(family, config, shapes):
    """The `Model` of a published config whose tensors have these shapes.

    Raises:
      UserError: naming every tensor that does not map, and every one left over.
    """
    found = {name: abstract(shape) for name, shape in shapes.items()}
    model = family.read(config, found)
    ours = family.shapes(model.tower, model.text)
    plan = mapping.steps(model.rows, found, ours)
    if lines := mapping.misfits(mapping.expected_shapes(plan, ours), found, model):
        raise UserError(f"{family.name} does not fit:\n  " + "\n  ".join(lines))
    return model

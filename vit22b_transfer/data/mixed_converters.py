"""SeqIO feature converter of a mixture of captions, labels and pairs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from vit22b_transfer import UserError
from vit22b_transfer.data import objectives as asked
from vit22b_transfer.data.converters import (
    Example,
    ImageFeatureConverter,
    ImageTextFeatureConverter,
    Lengths,
    Spec,
)
from vit22b_transfer.data.label_converters import ImageLabelFeatureConverter
from vit22b_transfer.data.pair_converters import PairFeatureConverter
from vit22b_transfer.models.mixed import OBJECTIVES
from vit22b_transfer.models.preparation import Preparation


class MixedFeatureConverter(ImageFeatureConverter):
    """Converter for one image, and what each objective learns of it.

    An example goes through the converter of every objective; for one that it does not
    have its labels and texts are empty, so that the features are zeros and the weights
    0. Shapes are thus those of all objectives together, in every batch.

    objectives: the model's, of `models.mixed.OBJECTIVES`. num_classes: of its
      classifier, None without one.

    Feature lengths are those of all objectives: `images`, and `inputs`, `targets` and
    `labels` as far as one of them has it. An example may have `objectives`
    (`data.objectives`); else its features say what it is for.
    """

    def __init__(
        self,
        pack: bool = False,
        use_custom_packing_ops: bool = False,
        apply_length_check: bool = True,
        bos_id: int = 0,
        passthrough_features: Mapping[str, Spec] | None = None,
        preparation: Preparation | None = None,
        *,
        objectives: Sequence[str],
        num_classes: int | None = None,
    ):
        options: dict[str, Any] = {"bos_id": bos_id, "preparation": preparation}
        made: dict[str, ImageFeatureConverter] = {}
        for name in objectives:
            if name == "captioning":
                made[name] = ImageTextFeatureConverter(**options)
            elif name == "contrastive":
                made[name] = PairFeatureConverter(**options)
            elif name == "classification":
                if num_classes is None:
                    raise UserError("classification needs num_classes.")
                made[name] = ImageLabelFeatureConverter(
                    **options, num_classes=num_classes
                )
            else:
                raise UserError(
                    f"unknown objective {name!r}; there are {', '.join(OBJECTIVES)}."
                )
        self.objectives = tuple(made)
        self._converters = made
        self.TASK_FEATURES = {asked.FEATURE: Spec(dtype=tf.int32)}
        self.MODEL_FEATURES = {}
        for part in made.values():
            self.TASK_FEATURES |= part.TASK_FEATURES
            self.MODEL_FEATURES |= part.MODEL_FEATURES
        self.TEXTS = _joined(part.TEXTS for part in made.values())
        self.TARGETS = _joined(part.TARGETS for part in made.values())
        self.COUNTED_EMPTY = _joined(part.COUNTED_EMPTY for part in made.values())
        super().__init__(
            pack,
            use_custom_packing_ops,
            apply_length_check,
            bos_id,
            passthrough_features,
            preparation,
        )

    def __call__(
        self, ds: tf.data.Dataset, task_feature_lengths: Lengths
    ) -> tf.data.Dataset:
        """The converted dataset."""
        return super().__call__(ds, self._with_own(task_feature_lengths))

    def shapes(self, lengths: Lengths) -> dict[str, tuple[int, ...]]:
        """As of the class above; nobody has to give a length of `objectives`."""
        return super().shapes(self._with_own(lengths))

    def without_target(self, features: Iterable[str]) -> str:
        """As of the class above; one of the targets is enough."""
        there = set(features) & set(self.TARGETS)
        return "" if there else f"neither {' nor '.join(self.TARGETS)}"

    def get_model_feature_lengths(
        self, task_feature_lengths: Lengths
    ) -> dict[str, int]:
        """Length of each model feature; of images the height."""
        lengths = self.passed_through(task_feature_lengths)
        for part in self._converters.values():
            lengths |= part.get_model_feature_lengths(task_feature_lengths)
        return lengths

    def features_of(
        self, ds: tf.data.Dataset, lengths: Lengths
    ) -> Callable[[Example], Example]:
        """As of the class above: what every objective's converter makes of it."""
        makers = {
            n: part.features_of(ds, lengths) for n, part in self._converters.items()
        }
        vectors = [n for n in ("inputs", "targets", "labels") if n in lengths]

        def convert(example: Example) -> Example:
            result: Example = {}
            for name, has in asked.of_example(example, self.objectives).items():
                kept = tf.where(has, tf.int32.max, 0)
                own = {vector: example[vector][:kept] for vector in vectors}
                result |= makers[name]({**example, **own})
            return result

        return convert

    def _with_own(self, lengths):
        return {asked.FEATURE: len(OBJECTIVES), **lengths}


def _joined(names: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for some in names for name in some))

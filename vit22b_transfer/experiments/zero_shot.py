"""Zero-shot probe: the class whose texts are nearest to an image; nothing is learned.

Names and templates are cleaned as in CLIP's and big_vision's evaluations
(`data.class_prompts`); a class is the mean of its prompts' embeddings.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.checkpoints import fingerprints, reading, restoring
from vit22b_transfer.evaluation import zero_shot
from vit22b_transfer.experiments import heads
from vit22b_transfer.experiments.labelled import Labelled
from vit22b_transfer.experiments.outcomes import Outcome
from vit22b_transfer.models import contrastive
from vit22b_transfer.partitioning.rules import Partitioning
from vit22b_transfer.training.state import abstract_variables


@dataclasses.dataclass(frozen=True)
class ZeroShot:
    """Protocol of the zero-shot probe.

    model: a `contrastive.ContrastiveModel`; its image tower is that of the features.
    templates: texts with "{}" where the name of a class stands.
    class_list: a file with the names of the classes, for a task without a class list of
      its own, or with one that is no text (such as WordNet's numbers).
    """

    model: Any
    templates: Sequence[str]
    class_list: str | None = None

    @property
    def features(self) -> Sequence[Sequence[str]]:
        """What the image tower pools: embeddings are made of it."""
        return (("pooled",),)

    def names(self, listed: Sequence[str] | None, num_classes: int) -> Sequence[str]:
        """The names of the classes, by id; `listed` are those of the task.

        Raises:
          UserError: if there are none, or not as many as classes.
        """
        from vit22b_transfer.data import class_lists

        if self.class_list is not None:
            listed = class_lists.names(self.class_list)
        if listed is None:
            raise UserError(
                "the task has no class list, so that classes have no names. Set "
                "ZeroShot.class_list to a file with one name per line."
            )
        if len(listed) != num_classes:
            raise UserError(
                f"the class list {self.class_list} has {len(listed)} names, but there "
                f"are {num_classes} classes."
            )
        return listed

    def run(
        self,
        test: Labelled,
        names: Sequence[str],
        checkpoint: str,
        partitioning: Partitioning,
        batch_size: int,
    ) -> list[Outcome]:
        """Accuracy, and with more than five classes the share among the best five.

        Of equally near classes the first stands first.
        test: pooled vectors. checkpoint: of the whole model.

        Raises:
          UserError: for a prompt of more tokens than the text tower has positions.
        """
        head = self.head(names, checkpoint, partitioning, batch_size)
        return self.outcomes(head, head.logits(test.features, test.what), test.labels)

    def outcomes(
        self,
        head: heads.Head,
        logits: Float[np.ndarray, "images classes"],
        labels: Int[np.ndarray, " images"],
    ) -> list[Outcome]:
        """Those of `run`, of logits that the head gave."""
        order = np.argsort(-logits, axis=1, kind="stable")
        found = []
        for k in zero_shot.AT:
            if k == 1 or k < head.classes:
                hits = (order[:, :k] == labels[:, None]).any(axis=1)
                metric = "accuracy" if k == 1 else f"accuracy_top_{k}"
                settings = head.facts["settings"]
                found.append(Outcome(settings, hits.astype(float), {}, metric))
        return found

    def head(
        self,
        names: Sequence[str],
        checkpoint: str,
        partitioning: Partitioning,
        batch_size: int,
    ) -> heads.Head:
        """The texts of the classes as a head on pooled vectors; errors as of `run`.

        Logits are the cosines times the scale that the model has learned.
        """
        from vit22b_transfer.data import class_prompts

        prompts = class_prompts.prompts(names, self.templates)
        params = self._restored(checkpoint, partitioning, batch_size)
        texts = self._embedded(params, sum(prompts, []), partitioning, batch_size)
        owners = np.repeat(np.arange(len(prompts)), [len(some) for some in prompts])
        (log_scale,) = jax.tree.leaves(params["logit_scale"])
        arrays = {
            "classes": zero_shot.class_embeddings(texts, owners, len(prompts)),
            "scale": np.exp(np.asarray(log_scale, np.float64)),
        }
        if self.model.module.image_projection:
            kernel = params["encoder"]["projection"]["kernel"]
            arrays["projection"] = np.asarray(kernel, np.float32)
        settings = {
            "prompts": len(texts),
            "text_weights": fingerprints.parameters_digest(params["text"]),
        }
        dtype = jnp.dtype(self.model.module.tower.dtype).name
        facts = {"settings": settings, "dtype": dtype}
        features = self.features[0]
        return heads.Head(
            heads.TEXTS, arrays, len(names), tuple(features), tuple(names), facts
        )

    def _restored(self, checkpoint, partitioning, batch_size) -> Any:
        """The text tower and what projects images; not the image tower."""
        module = self.model.module
        height, width = module.tower.image_size
        batch = {
            contrastive.IMAGES: jax.ShapeDtypeStruct(
                (batch_size, height, width, 3), jnp.uint8
            ),
            contrastive.TEXTS: jax.ShapeDtypeStruct(
                (batch_size, module.text.max_length), jnp.int32
            ),
        }
        abstract = abstract_variables(self.model, partitioning, batch)
        wanted = {name: abstract[name] for name in ("text", "logit_scale")}
        if module.image_projection:
            wanted["encoder"] = {"projection": abstract["encoder"]["projection"]}
        path = reading.resolve(checkpoint)
        return restoring.restore_partial(path, wanted, cast=True).params

    def _embedded(self, params, texts, partitioning, batch_size) -> np.ndarray:
        """Embeddings of texts [texts, embed], in float32."""
        module = self.model.module
        tokens = self._tokens(texts, module.text.max_length)

        def embed(params, tokens):
            return module.apply({"params": params}, tokens, method="embed_texts")

        found = []
        with partitioning.activate():
            jitted = jax.jit(embed, out_shardings=partitioning.replicated)
            for start in range(0, len(tokens), batch_size):
                part = tokens[start : start + batch_size]
                filled = np.pad(part, [(0, batch_size - len(part)), (0, 0)])
                found.append(np.asarray(jitted(params, filled))[: len(part)])
        return np.concatenate(found)

    def _tokens(self, texts, length) -> Int[np.ndarray, "texts length"]:
        vocabulary = self.model.input_vocabulary
        tokens = np.zeros((len(texts), length), np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = [*vocabulary.encode(text), vocabulary.eos_id]
            if len(ids) > length:
                raise UserError(
                    f"the prompt {text[:200]!r} has {len(ids)} tokens with its end, "
                    f"the text tower {length} positions. Shorten template or name."
                )
            row[: len(ids)] = ids
        return tokens

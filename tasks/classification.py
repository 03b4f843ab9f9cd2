"""Classification tasks, whatever their data.

An example is an image and the ids of its classes, one or several. Sources are
`ClassFolderSource` (a folder for each class, as ImageNet's) and `LabelFileSource` (a
CSV or JSON lines file) of `vit22b_transfer.data.labelled_sources`; `register_tfds` is
for a data set of TFDS. Where images have several labels, the metric `multi_label` adds
mean average precision, and gin_configs/models/multi_label.gin has the loss.
"""

import functools
from collections.abc import Callable, Sequence

import seqio

from vit22b_transfer import UserError
from vit22b_transfer.data import label_preprocessors, preprocessors
from vit22b_transfer.evaluation import label_metrics


def register_classification(
    name: str,
    source: seqio.DataSource,
    *,
    metric_fns: Sequence[Callable] = (label_metrics.single_label,),
    options: preprocessors.ReadingOptions | None = None,
    before: Sequence[Callable] = (),
) -> seqio.Task:
    """The registered task.

    `source` yields `image_path` or `image`, `labels` (ids) unless there is nothing to
    learn from, and if known `references` (their names) and `image_id`. The
    preprocessors `before` come first.
    """
    return seqio.TaskRegistry.add(
        name,
        # SeqIO's DataSource does not satisfy its own protocol to the letter.
        source=source,  # pyright: ignore[reportArgumentType]
        preprocessors=[*before, *label_preprocessors.label_preprocessors(options)],
        output_features=label_preprocessors.label_features(),
        postprocess_fn=label_preprocessors.labels_and_classes,
        metric_fns=metric_fns,
        shuffle_buffer_size=preprocessors.shuffle_buffer_size(source),
    )


def register_tfds(
    name: str,
    tfds_name: str,
    *,
    splits: dict[str, str],
    data_dir: str | None = None,
    image: str = "image",
    label: str = "label",
    id_feature: str | None = None,
    metric_fns: Sequence[Callable] = (label_metrics.single_label,),
    options: preprocessors.ReadingOptions | None = None,
) -> seqio.Task:
    """The registered task over a data set of TFDS, which nothing touches before a run.

    splits: the task's splits by name, such as {"train": "train[:90%]", "validation":
      "train[90%:]"}. A data set that is not there is downloaded when it is first read.
      It is read in sequence: resuming reads again what was read.

    Raises:
      UserError: for a name without a version.
    """
    if ":" not in tfds_name:
        raise UserError(
            f"the TFDS data set {tfds_name!r} has no version, so that it could change "
            "under a run. Name one, as in 'cifar10:3.0.2'."
        )
    return register_classification(
        name,
        seqio.TfdsDataSource(tfds_name, tfds_data_dir=data_dir, splits=splits),
        metric_fns=metric_fns,
        options=options,
        before=[
            functools.partial(
                label_preprocessors.rekey_tfds,
                image=image,
                label=label,
                id_feature=id_feature,
            )
        ],
    )

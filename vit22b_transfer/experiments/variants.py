"""A kept head on ImageNet's variants, and on labels that were judged again."""

import difflib
from collections.abc import Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities, class_subsets
from vit22b_transfer.evaluation.class_subsets import IMAGENET_A, IMAGENET_R, OBJECTNET
from vit22b_transfer.experiments import measured
from vit22b_transfer.experiments.features import Split
from vit22b_transfer.experiments.judged import Judge, Judged

# How a split's classes stand to the head's:
#   same        both have one list, or the split's are called by the head's ids
#   named       the split's are some of the head's, by name
#   imagenet_a, imagenet_r   the 200 of these sets, of ILSVRC's 1000; the split has
#               either list
#   objectnet   113 folders, of ILSVRC's 1000
LABELS = ("same", "named", "imagenet_a", "imagenet_r", "objectnet")
_SUBSETS = {"imagenet_a": IMAGENET_A, "imagenet_r": IMAGENET_R}


def accuracy(judge: Judge, test: Split, *, labels: str = "same") -> list[dict]:
    """Accuracy of a kept head on a labelled split, of its own classes or of some.

    labels: one of `LABELS`. With fewer classes than the head's two numbers are told:
      the best of the split's classes is right (`accuracy_of_subset`, what papers
      print), and the best of all the head's (`accuracy_of_all_classes`). ObjectNet's
      folders score by the largest logit of their classes.

    Raises:
      UserError: if class lists do not fit together; as `Judge.of`.
    """
    _check_form(labels)
    if labels not in ("same", "named"):
        _check_imagenet(judge.before(test)[0].classes, labels)
    found = judge.of(test)
    if labels == "same":
        ids = found.labels_of_head()
        findings = [
            measured.share(f"accuracy{name}", right)
            for name, right in _best_right(found.logits, ids).items()
        ]
    elif labels == "objectnet":
        scores, own = objectnet_scores(found)
        findings = [measured.share("accuracy", scores.argmax(axis=1) == own)]
    else:
        ids, subset = subset_labels(found, labels)
        places = class_subsets.positions(ids, subset)
        some = class_subsets.restricted(found.logits, subset)
        findings = [
            measured.share("accuracy_of_subset", some.argmax(axis=1) == places),
            measured.share(
                "accuracy_of_all_classes", found.logits.argmax(axis=1) == ids
            ),
        ]
    return measured.report(
        "accuracy",
        findings,
        protocol={"labels": labels},
        facts=judge.facts(test=test) | {"classes": found.head.classes},
        notes={"images": len(found.labels), **found.notes},
        output_dir=judge.output_dir,
    )


def _check_form(labels: str) -> None:
    if labels not in LABELS:
        near = difflib.get_close_matches(labels, LABELS, n=1, cutoff=0.0)
        raise UserError(f"labels={labels!r}; the nearest of {LABELS} is {near[0]!r}.")


def own_logits(
    found: Judged, labels: str
) -> tuple[Float[np.ndarray, "images asked"], Int[np.ndarray, " images"]]:
    """Logits of the classes that a split is asked about, and its labels among these.

    Their softmax are the head's probabilities of these classes alone, made to sum to
    1; of an ObjectNet folder the sum of its classes'.

    labels: one of `LABELS`.

    Raises:
      UserError: if class lists do not fit together.
    """
    _check_form(labels)
    if labels == "same":
        return found.logits, found.labels_of_head()
    if labels == "objectnet":
        _, own = objectnet_scores(found)
        shares = class_subsets.summed_probabilities(found.logits, OBJECTNET)
        return np.log(np.maximum(shares, np.finfo(np.float64).tiny)), own
    ids, subset = subset_labels(found, labels)
    some = class_subsets.restricted(found.logits, subset)
    return some, class_subsets.positions(ids, subset)


def subset_labels(
    found: Judged, labels: str
) -> tuple[Int[np.ndarray, " images"], tuple[int, ...]]:
    """Ids of the head's classes of each image, and those that it is asked about.

    labels: `named`, `imagenet_a` or `imagenet_r`.

    Raises:
      UserError: if the split's classes are not those.
    """
    names, ours = found.class_names, found.head.class_names
    if labels == "named":
        if names is None or ours is None:
            raise UserError(
                f"labels='named' needs the class lists of {found.what} and of the "
                "head, but one has none. Give the task a class list."
            )
        places = {name: number for number, name in enumerate(ours)}
        unknown = [name for name in names if name not in places]
        if unknown:
            raise UserError(
                f"{len(unknown)} of {len(names)} classes of {found.what} are none of "
                f"the head's, such as {unknown[0][:200]!r}. Take them off its list."
            )
        subset = tuple(places[name] for name in names)
        return np.array(subset)[found.labels], subset
    subset = _SUBSETS[labels]
    _check_imagenet(found.head.classes, labels)
    if found.num_classes == len(subset):
        return np.array(subset)[found.labels], subset
    if found.num_classes != class_subsets.CLASSES:
        raise UserError(
            f"{labels} has a class list of its {len(subset)} or of ILSVRC's 1000 "
            f"classes, but {found.what} has {found.num_classes}."
        )
    return found.labels, subset


def objectnet_scores(
    found: Judged,
) -> tuple[Float[np.ndarray, "images folders"], Int[np.ndarray, " images"]]:
    """Of each image the largest logits of ObjectNet's 113 folders, and its folder.

    Raises:
      UserError: if the split's classes are none of these folders.
    """
    _check_imagenet(found.head.classes, "objectnet")
    if found.class_names is None:
        raise UserError(f"{found.what} has no class list of ObjectNet's folders.")
    folders = list(OBJECTNET)
    unknown = [name for name in found.class_names if name not in OBJECTNET]
    if unknown:
        near = difflib.get_close_matches(unknown[0], folders, n=1, cutoff=0.0)
        raise UserError(
            f"{len(unknown)} classes of {found.what} are none of ObjectNet's 113 "
            f"folders that ImageNet has, such as {unknown[0][:200]!r}; nearest: "
            f"{near[0]!r}. List these 113 alone: images of others are left out."
        )
    places = np.array([folders.index(name) for name in found.class_names])
    return (
        class_subsets.largest_logits(found.logits, OBJECTNET),
        places[found.labels],
    )


def several_labels(judge: Judge, test: Split, *, judgements: str) -> list[dict]:
    """A kept head on images with any number of labels each, such as ReaL's.

    `accuracy`: the best class is one of an image's labels. For how uncertain people
    are: `cross_entropy` of the distribution of an image's labels (nats), its
    `divergence` (that less the entropy of the labels), and the accuracy of images
    with one label and with several apart.

    judgements: a JSON file, a list with a list of class ids for each image of the
      split, those that cannot be read as well, in the order of file names (without
      their folders). An id that stands twice is two votes; an empty list is an image
      that is left out, and counted. Labels of the task are not read.

    Raises:
      UserError: as `class_subsets.read_judgements` and `Judge.of`; if two images have
        one file name, or no image a label.
    """
    head, names = judge.before(test)
    judgements_of(names, judgements, head.classes, f"{test.task} {test.split}")
    found = judge.of(test, labelled=False)
    of_image = judgements_of(found.every_id, judgements, found.head.classes, found.what)
    given = [of_image[name] for name in found.ids]
    rows = np.flatnonzero([len(own) > 0 for own in given])
    if not len(rows):
        raise UserError(
            f"{judgements} has no label for any image of {found.what} that can be read."
        )
    votes = [given[row] for row in rows]
    logs = class_probabilities.log_softmax(found.logits[rows])
    best = logs.argmax(axis=1)
    right = np.array([n in own for n, own in zip(best, votes, strict=True)])
    losses = np.array(
        [-np.mean(row[list(own)]) for row, own in zip(logs, votes, strict=True)]
    )
    counts = [np.unique(own, return_counts=True)[1] for own in votes]
    entropies = np.array([scipy.stats.entropy(own) for own in counts])
    single = np.array([len(own) == 1 for own in counts])
    findings = [
        measured.share("accuracy", right),
        measured.mean("cross_entropy", losses),
        measured.mean("divergence", losses - entropies),
    ]
    for name, some in (("one", single), ("several", ~single)):
        if some.any():
            findings.append(measured.share(f"accuracy_of_{name}_label", right[some]))
    return measured.report(
        "several_labels",
        findings,
        protocol={"judgements": judgements},
        facts=judge.facts(test=test) | {"classes": found.head.classes},
        notes={
            "images": len(rows),
            "images_without_a_label": len(given) - len(rows),
            **found.notes,
        },
        output_dir=judge.output_dir,
    )


def judgements_of(
    names: Sequence[str], path: str, classes: int, what: str
) -> dict[str, tuple[int, ...]]:
    """The judged labels of each image of a split, by its name.

    names: of all images, in any order; without any nothing is looked at. what: the
      split, for errors.

    Raises:
      UserError: as `class_subsets.read_judgements`; if two images have one file name,
        or no image a label.
    """
    if not names:
        return {}
    files = {name.rpartition("/")[2]: name for name in names}
    if len(files) < len(names):
        raise UserError(
            f"{len(names) - len(files)} images of {what} have the file name of "
            "another, so that their order says nothing. Rename them."
        )
    given = class_subsets.read_judgements(path, len(files), classes)
    if not any(given):
        raise UserError(f"{path} has no label for any image of {what}.")
    return dict(zip((files[name] for name in sorted(files)), given, strict=True))


def _best_right(logits, labels):
    """Whether the label is the best class, and among the best five of more."""
    order = np.argsort(-logits, axis=1, kind="stable")
    result = {"": order[:, 0] == labels}
    if logits.shape[1] > 5:
        result["_top_5"] = (order[:, :5] == labels[:, None]).any(axis=1)
    return result


def _check_imagenet(classes: int, labels: str) -> None:
    if classes != class_subsets.CLASSES:
        raise UserError(
            f"labels={labels!r} is for a head of ILSVRC's 1000 classes, in their usual "
            f"order, but this one has {classes}. Learn one on ImageNet."
        )

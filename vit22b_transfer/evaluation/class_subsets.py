"""ImageNet's variants: data sets of some of its classes, and labels judged again.

A model of the 1000 classes is asked about fewer. Two forms are in use, and a result
says which it is: the best of the classes in question (argmax over their logits), or
their probabilities, which are made to sum to 1. The first needs no probabilities; the
second is what calibration is measured on.

Class ids are those of ILSVRC-2012, from 0. ImageNet-A and ImageNet-R (Hendrycks et al.
2021, arXiv 1907.07174 and 2006.16241) have 200 classes each, as in their repositories;
ObjectNet's map (Barbu et al. 2019) is that of its authors' template for evaluations,
113 of 313 folders with 125 classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8

from vit22b_transfer import UserError
from vit22b_transfer.evaluation import class_probabilities
from vit22b_transfer.host import json_files
from vit22b_transfer.host.json_files import PathLike

CLASSES = 1000
# The red frame around ObjectNet's pictures, in pixels.
OBJECTNET_FRAME = 2
# The published file of judgements has 0.4 MB.
_MOST_BYTES = 16 * 2**20


def numbers(text: str) -> tuple[int, ...]:
    """Ids in words: `8 10-12` is 8, 10, 11, 12."""
    parts = [part.split("-") for part in text.split()]
    return tuple(n for part in parts for n in range(int(part[0]), int(part[-1]) + 1))


IMAGENET_A = numbers(
    """
    6 11 13 15 17 22-23 27 30 37 39 42 47 50 57 70-71 76 79 89-90 94 96-97 99 105
    107-108 110 113 124-125 130 132 143-144 150-151 207 234-235 254 277 283 287
    291 295 298 301 306-311 313-315 317 319 323-324 326-327 330 334-336 347 361
    363 372 378 386 397 400-402 404 407 411 416-417 420 425 428 430 437-438 445
    456-457 461-462 470 472 483 486 488 492 496 514 516 528 530 539 542-543 549
    552 557 561-562 569 572-573 575 579 589 606-607 609 614 626-627 640-643 658
    668 677 682 684 687 701 704 719 736 746 749 752 758 763 765 768 773-774 776
    779-780 786 792 797 802-804 813 815 820 823 831 833 835 839 845 847 850 859
    862 870 879-880 888 890 897 900 907 913 924 932-934 937 943 945 947 951 954
    956-957 959 971-972 980-981 984 986-988
    """
)
IMAGENET_R = numbers(
    """
    1-2 4 6 8-9 11 13 22-23 26 29 31 39 47 63 71 76 79 84 90 94 96-97 99-100 105
    107 113 122 125 130 132 144-145 147-148 150-151 155 160-163 171-172 178 187
    195 199 203 207-208 219 231-232 234-235 242 245 247 250-251 254 259-260 263
    265 267 269 276-277 281 288-289 291-293 296 299 301 308-311 314-315 319 323
    327 330 334-335 337-338 340-341 344 347 353 355 361-362 365-368 372 388 390
    393 397 401 407 413-414 425 428 430 435 437 441 447-448 457 462-463 469-472
    476 483 487 515 546 555 558 570 579 583 587 593-594 596 609 613 617 621 629
    637 657-658 701 717 724 763 768 774 776 779-780 787 805 812 815 820 824 833
    847 852 866 875 883 889 895 907 928 931-934 936-937 943 945 947-949 951
    953-954 957 963 965 967 980-981 983 988
    """
)
OBJECTNET: Mapping[str, tuple[int, ...]] = {
    name: numbers(ids.replace("+", " "))
    for name, _, ids in (
        entry.partition(":")
        for entry in """
    alarm_clock:409+530 backpack:414 banana:954 band_aid:419 basket:790
    beer_bottle:440 bench:703 bicycle:444+671 binder_closed:446 bottle_cap:455
    bread_loaf:930 broom:462 bucket:463 butchers_knife:499 can_opener:473
    candle:470 cellphone:487 chair:423+559+765 clothes_hamper:588
    coffee_french_press:550 combination_lock:507 computer_mouse:673 desk_lamp:846
    doormat:539 dress:578 dress_shoe_men:630 drill:740 drinking_cup:968
    drying_rack_for_dishes:729 envelope:549 fan:545 frying_pan:567
    full_sized_towel:434 hair_dryer:589 hammer:587 hand_towel_or_rag:533
    helmet:518+560 iron_for_clothes:606 jeans:608 keyboard:508 ladle:618
    lampshade:619 laptop_open:620 lemon:951 letter_opener:623 lighter:626
    lipstick:629 match:644 measuring_cup:647 microwave:651 mixing_salad_bowl:659
    monitor:664 mug:504 nail_fastener:677 necklace:679 orange:950 padlock:695
    paintbrush:696 paper_towel:700 pen:418+563+749 pill_bottle:720 pillow:721
    pitcher:725 plastic_bag:728 plate:923 plunger:731 pop_can:737
    portable_heater:811 printer:742 remote_control:761 ruler:769 running_shoe:770
    safety_pin:772 salt_shaker:773 sandal:774 screw:783 shovel:792
    skirt:601+655+689 sleeping_bag:797 soap_dispenser:804 sock:806 soup_bowl:809
    spatula:813 speaker:632 still_camera:732+759 strainer:828 stuffed_animal:850
    suit_jacket:834 sunglasses:837 sweater:841 swimming_trunks:842 t-shirt:610
    teapot:849 tennis_racket:752 tie:457+906 toaster:859 toilet_paper_roll:999
    trash_bin:412 tray:868 tv:851 umbrella:879 vacuum_cleaner:882 vase:883
    wallet:893 watch:531 water_bottle:898 weight_exercise:543 weight_scale:778
    wheel:479+694 whistle:902 wine_bottle:907 winter_glove:658 wok:909
        """.split()
    )
}


def restricted(
    logits: Float[np.ndarray, "examples classes"], subset: Sequence[int]
) -> Float[np.ndarray, "examples subset"]:
    """The logits of some classes, in their order.

    Their softmax is the renormalised probabilities of all.

    Raises:
      UserError: if one is no class of the model, or is there twice.
    """
    _check_classes(subset, logits.shape[1])
    return logits[:, list(subset)]


def positions(
    labels: Int[np.ndarray, " examples"], subset: Sequence[int]
) -> Int[np.ndarray, " examples"]:
    """The place of each label in the subset: the labels of `restricted` logits.

    Raises:
      UserError: if a label is not in the subset.
    """
    places = {label: place for place, label in enumerate(subset)}
    outside = sorted({int(n) for n in labels} - set(places))
    if outside:
        raise UserError(
            f"{len(outside)} labels are not in the subset of {len(places)} classes, "
            f"such as {outside[:5]}; leave out their examples, and count them."
        )
    return np.array([places[int(n)] for n in labels], np.int64)


def accuracies(
    logits: Float[np.ndarray, "examples classes"],
    labels: Int[np.ndarray, " examples"],
    subset: Sequence[int],
) -> dict[str, float]:
    """`accuracy_of_subset` and `accuracy_of_all_classes`, in [0, 1].

    The best of the subset's classes is the label, and the best of all the model's: both
    are printed by Plex (Tran et al. 2022), papers on ImageNet-A and -R take the first.
    """
    logits = class_probabilities.checked_scores(logits, "logits")
    some = restricted(logits, subset).argmax(axis=1) == positions(labels, subset)
    return {
        "accuracy_of_subset": float(np.mean(some)),
        "accuracy_of_all_classes": float(np.mean(logits.argmax(axis=1) == labels)),
    }


def largest_logits(
    logits: Float[np.ndarray, "examples classes"],
    groups: Mapping[str, Sequence[int]],
) -> Float[np.ndarray, "examples groups"]:
    """Of each group of classes the largest logit: how ObjectNet's folders are scored.

    Raises:
      UserError: if a group is empty or names no class of the model.
    """
    for group in groups.values():
        _check_classes(group, logits.shape[1])
    columns = [logits[:, list(group)].max(axis=1) for group in groups.values()]
    return np.stack(columns, axis=1)


def summed_probabilities(
    logits: Float[np.ndarray, "examples classes"],
    groups: Mapping[str, Sequence[int]],
) -> Float[np.ndarray, "examples groups"]:
    """Of each group the sum of its classes' probabilities, over all groups 1.

    The second form of the module's docstring; its best group may be another than that
    of `largest_logits`.

    Raises:
      UserError: as `largest_logits`; if groups share a class.
    """
    every = [number for group in groups.values() for number in group]
    shares = class_probabilities.softmax(restricted(logits, every))
    owners = np.repeat(np.arange(len(groups)), [len(g) for g in groups.values()])
    result = np.zeros((len(logits), len(groups)))
    np.add.at(result.T, owners, shares.T)
    return result


def without_frame(
    image: UInt8[np.ndarray, "height width 3"], frame: int = OBJECTNET_FRAME
) -> UInt8[np.ndarray, "inner_height inner_width 3"]:
    """A picture of ObjectNet without its frame of red pixels.

    Raises:
      UserError: if nothing is left.
    """
    if min(image.shape[:2]) <= 2 * frame:
        raise UserError(
            f"a picture of {image.shape[0]} x {image.shape[1]} pixels has nothing "
            f"within a frame of {frame}."
        )
    return image[frame:-frame, frame:-frame]


def read_judgements(
    path: PathLike, images: int = 50_000, classes: int = CLASSES
) -> list[tuple[int, ...]]:
    """The classes of each validation image, in the order of file names (ReaL).

    Beyer et al. 2020 (arXiv 2006.07159) asked people anew; their `real.json` is a list
    of lists of class ids. Images for which none was agreed on have none.

    Raises:
      UserError: if the file is no list of `images` lists of ids below `classes`.
    """
    content = json_files.read(path, limit=_MOST_BYTES)
    if not isinstance(content, list) or len(content) != images:
        found = f"{len(content)} entries" if isinstance(content, list) else "no list"
        raise UserError(f"{path} is to have a list of {images} lists, but has {found}.")
    for number, own in enumerate(content):
        if not isinstance(own, list) or not all(
            type(one) is int and 0 <= one < classes for one in own
        ):
            raise UserError(
                f"{path}, entry {number}: class ids from 0 to {classes - 1} are "
                f"expected, but there is {str(own)[:80]!r}."
            )
    return [tuple(own) for own in content]


def judged_accuracy(
    predictions: Int[np.ndarray, " images"], judgements: Sequence[Sequence[int]]
) -> dict[str, float]:
    """`accuracy` in [0, 1]: the best class is one of those that people agreed on.

    Images without any are in neither part of the fraction; `judged` and `not_judged`
    count both.

    Raises:
      UserError: if none is judged, or there are other numbers of both.
    """
    if len(predictions) != len(judgements):
        raise UserError(
            f"{len(predictions)} predictions stand beside the judgements of "
            f"{len(judgements)} images; predict the whole validation split, in the "
            "order of its file names."
        )
    hits = [
        int(best) in own
        for best, own in zip(predictions, judgements, strict=True)
        if len(own)
    ]
    if not hits:
        raise UserError(f"none of the {len(predictions)} images is judged.")
    return {
        "accuracy": float(np.mean(hits)),
        "judged": float(len(hits)),
        "not_judged": float(len(judgements) - len(hits)),
    }


def _check_classes(group, classes):
    if not group or min(group) < 0 or max(group) >= classes:
        raise UserError(
            f"the classes {list(group)[:8]} are asked for, but the model has the "
            f"classes 0 to {classes - 1}; give classes of its own."
        )
    if len(set(group)) != len(group):
        raise UserError(f"of the classes {list(group)[:8]}... one is there twice.")

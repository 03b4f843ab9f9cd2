"""A folder with every layout that the suite knows, drawn small."""

import json

import numpy as np
import PIL.Image
import tiny_classifier

SIDE = 32
NAMES = sorted(tiny_classifier.ANGLES)


def save(path, picture):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(picture).save(path)


def stripes(rng, name=None, side=SIDE):
    return tiny_classifier.stripes(name or NAMES[rng.integers(4)], rng, side)


def draw(root, *, side=SIDE):
    """All layouts below `root`, their pictures of so many pixels; the root."""
    rng = np.random.default_rng(0)
    tiny_classifier.draw_folders(root, train=6, validation=4, size=side)
    for name in ("few_shot/pets", "inaturalist_2017"):
        tiny_classifier.draw_folders(root / name, train=3, validation=2, size=side)
    images = sorted((root / "validation").rglob("*.png"))
    for path in images:  # ReaL's list goes by file names, which are to be different
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    stems = sorted(f"{path.parent.name}_{path.name}" for path in images)
    judged = [[NAMES.index(stem.split("_")[0])] for stem in stems]
    judged[0], judged[1] = [], [0, 1]
    (root / "imagenet_real.json").write_text(json.dumps(judged))
    for number, name in enumerate(NAMES):
        for n in range(3):
            save(root / f"imagenet_v2/{number}/{n}.png", stripes(rng, name, side))
            if number < 2:
                save(root / f"imagenet_a/{name}/{n}.png", stripes(rng, name, side))
                save(root / f"imagenet_r/{name}/{n}.jpg", stripes(rng, name, side))
    for n in range(5):
        noise = rng.integers(0, 256, (side, side, 3), np.uint8)
        save(root / f"ood/noise/{n}.png", noise)
    draw_pixels(root, rng, side)
    draw_people(root, rng, side)
    for n in range(4):
        for part in ("ref", "p0", "p1"):
            save(root / f"bapps/val/cnn/{part}/{n}.png", stripes(rng, side=side))
        (root / "bapps/val/cnn/judge").mkdir(parents=True, exist_ok=True)
        np.save(root / f"bapps/val/cnn/judge/{n}.npy", np.array([n / 3]))
    for split, count in (("training", 3), ("validation", 2)):
        for name in NAMES:
            for clip in range(count):
                for n in range(3):
                    where = f"kinetics400/{split}/{name}/{clip}/{n:03}.png"
                    save(root / where, stripes(rng, name, side))
    (root / "kinetics400/classes.txt").write_text("\n".join(NAMES))
    return root


def draw_pixels(root, rng, side):
    """Masks of three classes and depths."""
    for split, count in (("training", 4), ("validation", 3)):
        for n in range(count):
            picture = stripes(rng, side=side)
            bright = (picture.mean(axis=2) > 128).astype(np.uint8)
            save(root / f"ade20k/images/{split}/{n}.png", picture)
            save(root / f"ade20k/annotations/{split}/{n}.png", 1 + bright)
            save(root / f"waymo_depth/images/{split}/{n}.png", picture)
            depths = 256 * (5 + 20 * bright.astype(np.uint16))
            save(root / f"waymo_depth/depths/{split}/{n}.png", depths)
    (root / "ade20k/classes.txt").write_text("dark\nbright\n")


def draw_people(root, rng, side):
    """Attributes of pictures; stimuli, and what people said of them."""
    from vit22b_transfer.evaluation import human_responses, sixteen_classes

    rows = ["image_id,Male,Smiling,Attractive,partition"]
    for n in range(48):
        name = NAMES[n % 4]
        save(root / f"celeba/images/{n:06}.png", stripes(rng, name, side))
        yes = [1 if on else -1 for on in (n // 4 % 2, n % 4 < 2, n % 4 in (0, 2))]
        rows.append(f"{n:06}.png,{yes[0]},{yes[1]},{yes[2]},{n // 16}")
    (root / "celeba/attributes.csv").write_text("\n".join(rows) + "\n")
    human = root / "model_vs_human"
    kinds = sixteen_classes.NAMES
    trials = {"cue-conflict": [], "contrast": []}
    for number, (shape, texture) in enumerate(zip(kinds, kinds[1:], strict=False)):
        name = f"{shape}{number + 1}-{texture}2.png"
        save(human / f"stimuli/cue-conflict/{shape}/{name}", stripes(rng, side=side))
        trials["cue-conflict"].append((shape, "0", name))
        for condition in ("0", "c30"):
            name = f"{number:04}_cop_dnn_{condition}_{shape}_10_n0{number}_{number}.png"
            save(human / f"stimuli/contrast/{name}", stripes(rng, side=side))
            trials["contrast"].append((shape, condition, name))
    for data_set, some in trials.items():
        (human / "humans" / data_set).mkdir(parents=True)
        right, conditions, names = zip(*some, strict=True)
        said = tuple(rng.choice([kind, "na"]) for kind in right)
        told = human_responses.Responses(
            ("subject-01",) * len(some), said, right, conditions, names
        )
        path = human / "humans" / data_set / f"{data_set}_subject-01_session_1.csv"
        human_responses.write(path, told)
    # Of each of the sixteen one of the head's four classes.
    ids = {name: [number % 4] for number, name in enumerate(kinds)}
    (human / "sixteen.json").write_text(json.dumps(ids))

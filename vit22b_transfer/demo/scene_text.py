"""What is said about a scene: captions, questions, and ten annotators' answers."""

import dataclasses

import numpy as np

from vit22b_transfer.demo.scene_layout import SIZES, Scene, SceneConfig, SceneObject

CAPTIONS_PER_IMAGE = 5
ANSWERS_PER_QUESTION = 10
MAX_CAPTION_WORDS = 14

_NUMBER_WORDS = ("zero", "one", "two", "three", "four")
_OPPOSITES = {
    "left of": "right of",
    "right of": "left of",
    "above": "below",
    "below": "above",
}


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its true answer.

    `form` is the sentence pattern (answers are balanced within a form); `pairs` are the
    (color, shape) pairs that the question or its answer is about.
    """

    kind: str
    form: str
    text: str
    answer: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def question_type(self) -> str:
        """The opening words, as VQAv2's `question_type`."""
        return " ".join(self.text.rstrip("?").split()[:3])

    @property
    def answer_type(self) -> str:
        """VQAv2's `answer_type`: 'yes/no', 'number' or 'other'."""
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


def caption_scene(rng: np.random.Generator, scene: Scene) -> list[str]:
    """Five different true captions of at most 14 words, lower case, in random order."""
    fitting = [c for c in _captions(scene) if len(c.split()) <= MAX_CAPTION_WORDS]
    chosen = rng.permutation(len(fitting))[:CAPTIONS_PER_IMAGE]
    return [fitting[i] for i in chosen]


def list_objects(scene: Scene) -> str:
    """The plainest complete caption: "a red circle and a blue square"."""
    return _join([f"a {thing.name}" for thing in scene.objects])


def _captions(scene):
    things = scene.objects
    count = len(things)
    listed = list_objects(scene)
    bare = _join([thing.name for thing in things])
    noun = "shape" if count == 1 else "shapes"
    captions = [
        listed,
        f"{'there is' if count == 1 else 'there are'} {listed}",
        f"a picture of {listed}",
        f"the image shows {listed}",
        f"{_NUMBER_WORDS[count]} {noun}: {bare}",
        _join([f"a {thing.size} {thing.name}" for thing in things]),
    ]
    if count == 1:
        captions.append(f"{listed} {_place_words(scene, things[0])}")
    if count == 2:
        captions.append(_relation_words(scene, *things))
    if count == 4:
        # The lists with articles are too long for four objects: these are shorter.
        captions += [
            f"a drawing of {bare}",
            f"{bare} on a light background",
            f"picture with {bare}",
        ]
    return captions


def _join(phrases):
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def _place_words(scene, thing):
    vertical = "top" if thing.y < scene.image_size / 2 else "bottom"
    horizontal = "left" if thing.x < scene.image_size / 2 else "right"
    return f"at the {vertical} {horizontal}"


def _relation_words(scene, one, other):
    for direction in _OPPOSITES:
        if scene.is_beyond(one, other, direction):
            return f"a {one.name} {direction} a {other.name}"
    raise AssertionError("two objects in different cells are always apart")


def possible_answers(form: str, config: SceneConfig) -> tuple[str, ...]:
    """The answers that are worth asking for in questions of this form."""
    kind = form.split("/")[0]
    if kind == "color":
        return config.colors
    if kind in ("shape", "relation"):
        return config.shapes
    if kind == "size":
        return SIZES
    if kind in ("exists", "compare"):
        return ("yes", "no")
    least = config.min_objects if form == "count/all" else 0
    return tuple(str(n) for n in range(least, config.max_objects + 1))


def question_forms(kind: str) -> tuple[str, ...]:
    """The sentence patterns of one of the QUESTION_TYPES."""
    if kind == "count":
        return ("count/all", "count/color", "count/shape")
    if kind in ("relation", "compare"):
        return tuple(f"{kind}/{direction}" for direction in _OPPOSITES)
    return (kind,)


def candidate_questions(
    scene: Scene, config: SceneConfig, *, held_out: bool
) -> list[Question]:
    """Every question that has one clear answer in the scene.

    Ordinary questions never name a held-out pair. With `held_out` only questions
    about a held-out pair are returned.
    """
    makers = {
        "color": _color_questions,
        "shape": _shape_questions,
        "size": _size_questions,
        "count": _count_questions,
        "relation": _relation_questions,
        "compare": _compare_questions,
    }
    questions = []
    for kind in config.question_types:
        if kind == "exists":
            questions += _exists_questions(scene, config, held_out=held_out)
        elif kind == "count":
            questions += _count_questions(scene, config)
        else:
            questions += makers[kind](scene)
    if held_out:
        rare = set(config.held_out_pairs)
        questions = [q for q in questions if rare.intersection(q.pairs)]
    return questions


def _unique(scene: Scene, attribute: str) -> list[SceneObject]:
    values = [getattr(thing, attribute) for thing in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]


def _color_questions(scene):
    return [
        Question("color", "color", f"what color is the {o.shape}?", o.color, (o.pair,))
        for o in _unique(scene, "shape")
    ]


def _shape_questions(scene):
    return [
        Question(
            "shape", "shape", f"what shape is the {o.color} object?", o.shape, (o.pair,)
        )
        for o in _unique(scene, "color")
    ]


def _size_questions(scene):
    return [
        Question("size", "size", f"what size is the {o.name}?", o.size, (o.pair,))
        for o in scene.objects
    ]


def _count_questions(scene, config):
    things = scene.objects
    pairs = tuple(o.pair for o in things)
    questions = [
        Question(
            "count", "count/all", "how many objects are there?", str(len(things)), pairs
        )
    ]
    for attribute, words in (("color", "{} objects"), ("shape", "{}s")):
        for value in getattr(config, f"{attribute}s"):
            counted = tuple(o.pair for o in things if getattr(o, attribute) == value)
            plural = "crosses" if value == "cross" else words.format(value)
            text = f"how many {plural} are there?"
            form = f"count/{attribute}"
            questions.append(Question("count", form, text, str(len(counted)), counted))
    return questions


def _exists_questions(scene, config, *, held_out):
    present = {o.pair for o in scene.objects}
    asked = config.held_out_pairs if held_out else config.ordinary_pairs
    return [
        Question(
            "exists",
            "exists",
            f"is there a {color} {shape}?",
            "yes" if (color, shape) in present else "no",
            ((color, shape),),
        )
        for color, shape in asked
    ]


def _relation_questions(scene):
    questions = []
    for anchor in scene.objects:
        for direction in _OPPOSITES:
            beyond = [
                o
                for o in scene.objects
                if o is not anchor and scene.is_beyond(o, anchor, direction)
            ]
            if len(beyond) == 1:
                text = f"what shape is {direction} the {anchor.name}?"
                pairs = (anchor.pair, beyond[0].pair)
                form = f"relation/{direction}"
                questions.append(
                    Question("relation", form, text, beyond[0].shape, pairs)
                )
    return questions


def _compare_questions(scene):
    questions = []
    for one in scene.objects:
        for other in scene.objects:
            for direction, opposite in _OPPOSITES.items():
                holds = scene.is_beyond(one, other, direction)
                if holds or scene.is_beyond(one, other, opposite):
                    text = f"is the {one.name} {direction} the {other.name}?"
                    answer = "yes" if holds else "no"
                    form = f"compare/{direction}"
                    pairs = (one.pair, other.pair)
                    questions.append(Question("compare", form, text, answer, pairs))
    return questions


def choose_questions(
    rng: np.random.Generator,
    candidates: list[Question],
    first: Question,
    config: SceneConfig,
) -> list[Question]:
    """`first` and more, each of another kind, with answers balanced within a form."""
    chosen = [first]
    kinds = [k for k in config.question_types if k != first.kind]
    for kind in (kinds[i] for i in rng.permutation(len(kinds))):
        if len(chosen) == config.questions_per_image:
            break
        forms = sorted({q.form for q in candidates if q.kind == kind})
        if not forms:
            continue
        form = forms[rng.integers(len(forms))]
        answers = sorted({q.answer for q in candidates if q.form == form})
        answer = answers[rng.integers(len(answers))]
        question = pick(rng, candidates, form, answer)
        assert question is not None  # its form and answer come from the candidates
        chosen.append(question)
    return chosen


def pick(
    rng: np.random.Generator, candidates: list[Question], form: str, answer: str
) -> Question | None:
    """A random candidate of this form with this answer; None if there is none."""
    fitting = [q for q in candidates if q.form == form and q.answer == answer]
    return fitting[rng.integers(len(fitting))] if fitting else None


def annotator_answers(
    rng: np.random.Generator, question: Question, config: SceneConfig
) -> list[dict]:
    """Ten answers in VQAv2's form, at least seven of them the true one.

    Some annotators write a number as a word, and now and then one errs.
    """
    answers = [question.answer] * ANSWERS_PER_QUESTION
    confidences = ["yes"] * ANSWERS_PER_QUESTION
    slots = rng.permutation(ANSWERS_PER_QUESTION)[:3]
    others = [
        a for a in possible_answers(question.form, config) if a != question.answer
    ]
    if rng.random() < 0.25:
        answers[slots[0]] = others[rng.integers(len(others))] if others else "unsure"
        confidences[slots[0]] = "maybe"
    if question.answer.isdigit():
        for slot in slots[1:]:
            if rng.random() < 0.5:
                answers[slot] = _NUMBER_WORDS[int(question.answer)]
    return [
        {"answer": answer, "answer_confidence": confidence, "answer_id": number}
        for number, (answer, confidence) in enumerate(
            zip(answers, confidences, strict=True), start=1
        )
    ]

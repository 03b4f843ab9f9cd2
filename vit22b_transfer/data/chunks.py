"""Several examples in one call of a Python function, between steps that take one each.

A call out of TensorFlow takes some 50 us of a processor, and each takes the
interpreter's lock anew: as much as the decoding of a small picture.
"""

from collections.abc import Callable

import tensorflow as tf

from vit22b_transfer.data.converters import Example, feature_specs, map_examples

# Examples of a call, and the bytes that they may take together if there are several.
MOST_EXAMPLES, MOST_BYTES = 16, 4 * 2**20


def size_for(example_bytes: int) -> int:
    """How many examples, each of so many bytes in the end, one call is to be of."""
    return max(1, min(MOST_EXAMPLES, MOST_BYTES // max(1, example_bytes)))


def map_in_chunks(
    dataset: tf.data.Dataset,
    function: Callable[[Example], Example],
    then: Callable[[Example], Example],
    size: int,
    *,
    needs: str,
) -> tf.data.Dataset:
    """The dataset with `function` and `then` applied, order and number unchanged.

    function: plain TensorFlow on up to `size` examples at a time, stacked: each feature
      has one axis more, in front. Vectors and what else has no fixed shape are hidden
      from it, but for the feature that it `needs`; one without a fixed shape needs
      size 1, and so, here, does what is no plain tensor.
    then: plain TensorFlow on each example, with all of its features again.
    """
    specs = feature_specs(dataset)
    plain = {n: spec for n, spec in specs.items() if type(spec) is tf.TensorSpec}
    if len(plain) < len(specs):
        size = 1
    # TensorFlow 2.21 dies where it takes an empty tensor out of a batch.
    hidden = {
        name: spec
        for name, spec in plain.items()
        if name != needs and (spec.shape.num_elements() or 0) < 1
    }

    def hide(example):
        kept = {name: x for name, x in example.items() if name not in hidden}
        return kept | {
            f"{name}/hidden": tf.io.serialize_tensor(example[name]) for name in hidden
        }

    def call(examples):
        names = [f"{name}/hidden" for name in hidden]
        shown = {name: x for name, x in examples.items() if name not in names}
        return function(shown) | {name: examples[name] for name in names}

    def finish(example):
        example = dict(example)
        for name, spec in hidden.items():
            content = example.pop(f"{name}/hidden")
            value = tf.io.parse_tensor(content, spec.dtype)
            example[name] = tf.ensure_shape(value, spec.shape)
        return then(example)

    number = dataset.cardinality()
    if hidden:
        dataset = dataset.map(tf.autograph.experimental.do_not_convert(hide))
    called = map_examples(dataset.batch(size), call).unbatch()
    if number != tf.data.UNKNOWN_CARDINALITY:
        called = called.apply(tf.data.experimental.assert_cardinality(number))
    return map_examples(called, finish)

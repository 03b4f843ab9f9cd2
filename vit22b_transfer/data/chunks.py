"""Several examples in one call of a Python function, between steps that take one each.

A call out of TensorFlow takes some 50 us of a processor, and each takes the
interpreter's lock anew: as much as the decoding of a small picture. Where a source
itself fails, the examples before it that would have been in its call do not come out.
"""

from collections.abc import Callable, Collection

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
    needs: Collection[str],
) -> tf.data.Dataset:
    """The dataset with `function` and `then` applied, order and number unchanged.

    function: plain TensorFlow on up to `size` examples at a time, stacked: each feature
      has one axis more, in front. Vectors and what else has no fixed shape are hidden
      from it, but for the features that it `needs`: of several examples these have one
      shape. So is what is no plain tensor.
    then: plain TensorFlow on each example, with all of its features again.
    """
    specs = feature_specs(dataset)
    shown = {
        name
        for name, spec in specs.items()
        if type(spec) is tf.TensorSpec
        and (name in needs or (spec.shape.num_elements() or 0) > 0)
    }
    hidden = specs.keys() - shown
    if any(type(specs[name]) is not tf.TensorSpec for name in hidden):
        size = 1

    if size == 1:

        def alone(example):
            made = function({name: example[name][None] for name in shown})
            made = {name: x[0] for name, x in made.items()}
            return then(made | {name: example[name] for name in hidden})

        return map_examples(dataset, alone)

    # Apart, so that no name can be of both. TensorFlow 2.21 dies where it takes an
    # empty tensor out of a batch, so these are strings.
    def split(example):
        texts = {name: tf.io.serialize_tensor(example[name]) for name in hidden}
        return {name: example[name] for name in shown}, texts

    def finish(made, texts):
        found = {}
        for name, content in texts.items():
            spec = specs[name]
            value = tf.io.parse_tensor(content, spec.dtype)
            found[name] = tf.ensure_shape(value, spec.shape)
        return then(made | found)

    plain = tf.autograph.experimental.do_not_convert
    number = dataset.cardinality()
    parts = dataset.map(plain(split)).batch(size)
    called = parts.map(
        plain(lambda examples, texts: (function(examples), texts)),
        num_parallel_calls=tf.data.AUTOTUNE,
    ).unbatch()
    if number != tf.data.UNKNOWN_CARDINALITY:
        called = called.apply(tf.data.experimental.assert_cardinality(number))
    return called.map(plain(finish), num_parallel_calls=tf.data.AUTOTUNE)

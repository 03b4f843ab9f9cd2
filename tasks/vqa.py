"""Visual question answering tasks, whatever their data.

An example is an image and the prompt "answer en {question}"; the target is the answer
that VQA accuracy rewards most, and the answers of all annotators are its references.
Other metrics are the `metric_fns` of a task: `vqa_metrics.anls` where answers are texts
in the image, `vqa_metrics.exact_match` where a question has one answer. Accuracies by
`answer_type` and `question_type` come beside the whole where the annotations have them.
"""

import functools

from tasks.image_text import register
from vit22b_transfer.data.question_kinds import answers_and_predictions
from vit22b_transfer.evaluation import vqa_metrics

register_vqa = functools.partial(
    register,
    prompt="answer en {question}",
    metric_fns=(vqa_metrics.vqa,),
    postprocess_fn=answers_and_predictions,
)
# VQA accuracy needs several answers to a question; these do with one.
register_short_answers = functools.partial(
    register,
    prompt="answer en {question}",
    metric_fns=(vqa_metrics.exact_match, vqa_metrics.anls),
    postprocess_fn=answers_and_predictions,
)

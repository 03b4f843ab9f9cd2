"""Predictions as OpenAI's batch API answers, which `vllm run-batch` writes as well.

One line for each request, in the order of the requests:

    {"id": "line-0", "custom_id": "a", "response": {"status_code": 200, "body":
     {"object": "chat.completion", "choices": [{"index": 0, "message": {"role":
     "assistant", "content": "a cat"}, "finish_reason": "stop"}]}}, "error": null}

or in place of a response `error`: {"code": "invalid_image", "message": ...}.
(OpenAI's reference, "The request output object" of the Batch API.)
"""

import json
from typing import Any

from vit22b_transfer.host import whole_files
from vit22b_transfer.inference.prediction_files import read_lines


def write_responses(path: str, to: str, *, model: str) -> int:
    """Writes a complete file of predictions as responses; how many there are.

    model: what they are said to be of. `custom_id` is the request's, or of images that
    came otherwise their id.

    Raises:
      UserError: if the file of predictions cannot be read.
    """
    count = 0
    with whole_files.replacing(to) as file:
        for line in read_lines(path):
            text = json.dumps(_response(line, model), ensure_ascii=False)
            file.write(f"{text}\n")
            count += 1
    return count


def _response(line: dict[str, Any], model: str) -> dict[str, Any]:
    name = f"line-{line['index']}"
    custom_id = line.get("question_id") or line.get("image_id", "")
    said = {"id": name, "custom_id": custom_id}
    if "error" in line:
        error = {"code": "invalid_image", "message": line["error"]}
        return said | {"response": None, "error": error}
    message = {"role": "assistant", "content": line["prediction"]}
    body = {
        "id": name,
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
    response = {"status_code": 200, "request_id": name, "body": body}
    return said | {"response": response, "error": None}

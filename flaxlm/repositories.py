# SPDX-License-Identifier: Apache-2.0
"""Files of a model in a directory or in a repository of the Hub: finding them, and saying in a line why they cannot be read."""

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from flaxlm import cli


def find_file(source: str, name: str, options: Mapping[str, Any]) -> str:
    """The path of a file of a directory or a repository, downloaded if need be; `source` may be the file itself.

    `options`: cache_dir, token and revision, as from_pretrained takes them. Raises OSError.
    """
    if os.path.isfile(source):
        return source
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, name)):
            raise FileNotFoundError(f"there is no {name} in it")
        return os.path.join(source, name)
    options = {key: value for key, value in options.items() if key in ("cache_dir", "token", "revision")}
    path = cached_file(source, name, **options)
    if path is None:
        raise FileNotFoundError(f"there is no {name} in that repository")
    return path


@contextlib.contextmanager
def reading(what: str, options: Mapping[str, Any]) -> Iterator[None]:
    """cli.reading for what transformers reads, whose words often lead astray; `options` are those that it was called with."""
    with cli.reading(what):
        try:
            yield
        except Exception as error:
            if isinstance(error, cli.Ending) or cli.is_accident(error):
                raise
            raise cli.Mistake(" ".join(f"{what}: {plain_reason(error, options)}".split())) from error


REFUSALS = {  # by status; the Hub does not tell a repository that is not there from one that may not be seen
    401: "there is no such directory, and no repository of that name which this token, if there is one, may read",
    403: "the token may not read that",
}
LEADS_ASTRAY = {  # what is in messages of transformers, and what to say instead
    "Unrecognized model": "its config.json has no model_type",
    "Repo id must be": "there is no such directory, and no repository of the Hub can have that name",
    "custom code": "it comes with code of its own, which is not run",
    "not NoneType|'NoneType' object|model_proto": "a file that its class needs is missing",
    "[Tt]ik[Tt]oken": "it is cut short or damaged, or of tiktoken: pip install tiktoken blobfile",
}


def plain_reason(error: Exception, options: Mapping[str, Any]) -> str:
    """The first line of an error, or better; `options` say whether there is a flag --trust_remote_code."""
    is_strict = type(error).__name__.startswith("StrictDataclass")  # whose first line names a method
    lines = str(error.__cause__ if is_strict and error.__cause__ else error).strip().splitlines()
    reason = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1]) or type(error).__name__
    reason = reason.strip("\"'") if isinstance(error, KeyError) else reason
    answers = (getattr(cause, "response", None) for cause in cli.causes(error))
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if status in REFUSALS:
        return f"{REFUSALS[status]} (HTTP {status})"
    advice = " unless --trust_remote_code is added" if "custom code" in reason and "trust_remote_code" in options else ""
    replacement = next((LEADS_ASTRAY[part] + advice for part in LEADS_ASTRAY if re.search(part, reason)), None)
    says_it = status is None or re.search(rf"\b{status}\b", reason)  # a port, 42923, has a 429 too
    return replacement or (reason if says_it else f"{reason} (HTTP {status})")


def read_json_object(path: str) -> tuple[dict[str, Any], str | None]:
    """What a JSON file holds, and what is wrong with it, if anything is."""
    try:
        fields = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return {}, f"cannot be read as JSON: {cli.first_line(error)}"
    return (fields, None) if isinstance(fields, dict) else ({}, "must hold one JSON object")

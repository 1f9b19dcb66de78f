"""Answers to questions that belong to no request: the ids of a prompt, the text of ids. No sockets,
no state; safe in any thread."""

import logging

from pagewire_protocol.messages import Detokenize, Tokenize, Tokenized

from .encode import LONG, Encoder, Refused, size_of

log = logging.getLogger("pagewire.tokenizer")
Question = Tokenize | Detokenize
LONG_IDS = LONG // 4


def is_long(question: Question) -> bool:
    """Whether the answer takes so much work that it is to be made beside the loop."""
    if isinstance(question, Detokenize):
        return len(question.ids) > 4 * LONG_IDS
    return size_of(question.prompt) > LONG or len(question.prompt.ids or b"") > 4 * LONG_IDS


def answer(encoder: Encoder, question: Question) -> Tokenized:
    handle = question.handle
    try:
        if isinstance(question, Detokenize):
            return Tokenized(
                handle, text=encoder.decode(question.ids, question.skip_special_tokens)
            )
        ids = encoder.encode(question.prompt, question.add_special_tokens)
        return Tokenized(handle, ids, encoder.strings(ids) if question.with_texts else ())
    except Refused as refusal:
        return Tokenized(
            handle, status=refusal.status, message=refusal.message, param=refusal.param
        )
    # the tokenizers library raises bare Exception; one question must not end the service
    except Exception as error:
        log.exception("a question could not be answered")
        return Tokenized(
            handle,
            status=500,
            message=f"the question could not be answered ({type(error).__name__})",
        )


def not_yet(question: Question) -> Tokenized:
    return Tokenized(question.handle, status=503, message="this tokenizer is still loading")

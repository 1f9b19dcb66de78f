"""Llama 3.1 to 3.3: an answer that is the JSON of a call, perhaps behind `<|python_tag|>`; several
are separated by semicolons."""

from ..format import AnswerFormat, JsonCalls

FORMAT = AnswerFormat(
    name="llama3_json",
    parser_names=("llama3_json", "llama3", "llama4_json"),
    calls=JsonCalls(
        begin=("<|python_tag|>",),
        arguments_keys=("parameters", "arguments"),
        is_bare=True,
        separator="; ",
    ),
    signs=('"parameters": ', "<|start_header_id|>"),
)

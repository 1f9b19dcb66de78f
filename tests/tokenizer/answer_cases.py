"""What models write in each format: the same two calls, as text, and what is expected of them."""

from pagewire.tokenizer.answers.formats import FORMATS, REASONING, named_format
from pagewire.tokenizer.answers.parser import AnswerParser, Part
from pagewire.tokenizer.answers.tools import Tools
from pagewire_protocol.structs import PartKind

THINK = next(item for item in REASONING if item.name == "think")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "zip": {"type": "string"},
                    "options": {"type": "object"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    },
]
WEATHER = {"city": "São Paulo", "days": 2, "zip": "7"}
_JSON = '{"city": "São Paulo", "days": 2, "zip": "7"}'
CASES: dict[str, str] = {
    "hermes": f'Sure.\n<tool_call>\n{{"name": "get_weather", "arguments": {_JSON}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "Sure.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão Paulo\n</parameter>\n"
    "<parameter=days>\n2\n</parameter>\n<parameter=zip>\n7\n</parameter>\n</function>\n</tool_call>\n"
    "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "llama3_json": f'{{"name": "get_weather", "parameters": {_JSON}}}; {{"name": "now", "parameters": {{}}}}',
    "pythonic": '[get_weather(city="São Paulo", days=2, zip="7"), now()]',
    "olmo3": "Sure.<function_calls>\nget_weather(city='São Paulo', days=2, zip='7')\nnow()\n</function_calls>",
    "mistral": f'Sure.[TOOL_CALLS][{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "mistral_v11": f"Sure.[TOOL_CALLS]get_weather[ARGS]{_JSON}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
    "deepseek_v3": f"Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n{_JSON}\n```"
    "<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v31": f"Sure.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{_JSON}<｜tool▁call▁end｜>"
    "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "deepseek_v32": 'Sure.\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
    '<｜DSML｜parameter name="city" string="true">São Paulo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="zip" string="true">7</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    "glm45": "Sure.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>São Paulo</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>2</arg_value>\n<arg_key>zip</arg_key>\n<arg_value>7</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "kimi_k2": f"Sure.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{_JSON}"
    "<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>",
    "granite": f'Sure.<|tool_call|>[{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "phi4_mini": f'functools[{{"name": "get_weather", "arguments": {_JSON}}}, {{"name": "now", "arguments": {{}}}}]',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>São Paulo<|"|>,days:2,zip:<|"|>7<|"|>}<tool_call|><|tool_call>call:now{}<tool_call|>',
    "functiongemma": "<start_function_call>call:get_weather{city:<escape>São Paulo<escape>,days:2,zip:<escape>7<escape>}"
    "<end_function_call><start_function_call>call:now{}<end_function_call>",
    "functionary_v31": f"Sure.<function=get_weather>{_JSON}</function><function=now>{{}}</function>",
    "functionary_v32": f">>>all\nSure.\n>>>get_weather\n{_JSON}>>>now\n{{}}",
    "gpt_oss": f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Sure.<|end|>"
    f"<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{_JSON}<|call|>"
    "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
    "minimax_m2": 'Sure.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">São Paulo</parameter>\n'
    '<parameter name="days">2</parameter>\n<parameter name="zip">7</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
    "</minimax:tool_call>",
    "minimax_m1": f'Sure.\n<tool_calls>\n{{"name": "get_weather", "arguments": {_JSON}}}\n'
    f'{{"name": "now", "arguments": {{}}}}\n</tool_calls>',
    "generic": f'{{"name": "get_weather", "arguments": {_JSON}}}\n{{"name": "now", "arguments": {{}}}}',
}
assert {name.strip() for name in CASES} == {item.name for item in FORMATS}


def parser_of(name: str, opens_reasoning: bool = False) -> AnswerParser:
    answer_format = named_format(name.strip())
    assert answer_format is not None
    reasoning = None if name == "gpt_oss" else THINK
    return AnswerParser(answer_format, reasoning, Tools(TOOLS), "call-{}".format, opens_reasoning)


def joined(parts: list[Part]) -> list[Part]:
    """Neighbours of a kind as one part; the content as one, wherever it stood."""
    whole: dict[tuple[PartKind, int], str] = {}
    for kind, call, text in parts:
        whole[kind, call] = whole.get((kind, call), "") + text
    return [(kind, call, text) for (kind, call), text in sorted(whole.items())]


def parsed(name: str, pieces: list[str], opens_reasoning: bool = False) -> list[Part]:
    parser = parser_of(name, opens_reasoning)
    parts: list[Part] = []
    for piece in pieces:
        parts += parser.feed(piece)
    return joined(parts + parser.finish())

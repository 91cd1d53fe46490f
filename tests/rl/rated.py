"""Answers that are scored."""

from llmkit.rl.sample import Sample


def sample(completion, answer=None, *, prompt="how many?", line=1, **more):
    row = {} if answer is None else {"answer": answer}
    return Sample(prompt, completion, **({"row": row, "file": "rows.jsonl", "line": line} | more))


class Scripted:
    """A generator that answers by a function of what it is asked."""

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def each(self, asks):
        from llmkit.inference.request import Completion, Output

        for ask in asks:
            self.asked.append(ask)
            yield Completion((Output(self.answer(ask.prompt.said), (), "stop"),), 0)

    def close(self):
        pass


def part(messages, tag):
    """What stands in a tag of what a judge is asked."""
    return messages[-1]["content"].partition(f"<{tag}>\n")[2].partition(f"\n</{tag}>")[0]

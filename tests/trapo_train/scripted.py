"""Engines for tests: one that answers from a script, and one that works in rounds."""

from types import SimpleNamespace

from trapo_train.records import Completion


class ScriptedEngine:
    """Answers each prompt by `script(text)`, cut to its budget; remembers in `calls` what each call, or advance of a stream,
    answered at once, as [(text, budget), …]."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script = tokenizer, script
        self.calls, self.params = [], []

    def stream(self, params):
        self.params.append(params)
        return ScriptedStream(self)

    def generate(self, prompts, params):
        self.params.append(params)
        return self.answer(prompts, params.budgets(len(prompts)))

    def answer(self, prompts, budgets):
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        self.calls.append(list(zip(texts, budgets, strict=True)))
        completions = []
        for text, budget in zip(texts, budgets, strict=True):
            token_ids = tuple(self.tokenizer(self.script(text), add_special_tokens=False)["input_ids"])[:budget]
            reason = "stop" if token_ids[-1] == self.tokenizer.eos_token_id else "length"
            completions.append(Completion(token_ids, (-0.5,) * len(token_ids), reason))
        return completions


class ScriptedStream:
    """Answers everything that was handed in at the next advance."""

    in_order, hungry = True, True

    def __init__(self, engine):
        self.engine, self.waiting, self.keys = engine, [], []

    def submit(self, prompt, budget, key):
        self.waiting.append(SimpleNamespace(ticket=len(self.keys), prompt=prompt, budget=budget))
        self.keys.append(key)
        return self.waiting[-1].ticket

    def advance(self, others=()):
        answered, self.waiting = self.waiting, []
        completions = self.engine.answer([one.prompt for one in answered], [one.budget for one in answered])
        return [(one.ticket, completion) for one, completion in zip(answered, completions, strict=True)]

    def metrics(self):
        return {"rollout/rows_in_flight": 1.0}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        assert len(set(self.keys)) == len(self.keys), "two samples of a call would draw the same numbers"


class Rounds:
    """An engine with a barrier: plans go on once everything that was handed in is done."""

    def __init__(self, engine):
        self.engine = engine

    def stream(self, params):
        return RoundStream(self.engine.stream(params))


class RoundStream:
    in_order = True

    def __init__(self, stream):
        self.stream, self.running = stream, 0
        self.metrics = stream.metrics

    @property
    def hungry(self):
        return self.running == 0

    def submit(self, prompt, budget, key):
        self.running += 1
        return self.stream.submit(prompt, budget, key)

    def advance(self, others=()):
        done = self.stream.advance(others)
        self.running -= len(done)
        return done

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

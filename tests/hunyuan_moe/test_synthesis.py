"""The pipeline with scripted models, a real tiny one, and a server in this process."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tenfold.core.cli import main
from tenfold.hunyuan_moe.synthesis.generators import LocalModel, Server
from tenfold.hunyuan_moe.synthesis.pipeline import (
    Critique,
    Evolve,
    Filters,
    Instruct,
    NearDuplicates,
    Respond,
    final_answer,
    read_jsonl,
    run_step,
    select,
)


def scripted(prompts):
    """A model that says what it was asked, in a word and a number."""
    return [f"{len(p)} about {p.split()[-1]}" for p in prompts]


def test_the_steps():
    records = Instruct(scripted, kinds=("a", "b"))([{"text": "of rain", "id": "x"}, {"text": "of snow"}])
    assert [(r["kind"], r["instruction"].split()[-1]) for r in records] == [
        ("a", "rain"),
        ("b", "rain"),
        ("a", "snow"),
        ("b", "snow"),
    ]
    assert records[0]["source"] == "x"
    evolved = Evolve(scripted)(records)
    assert [len(r["history"]) for r in evolved] == [2] * 4
    assert evolved[0]["history"][0] == records[0]["instruction"] != evolved[0]["instruction"]
    answered = Respond(scripted, samples=2)(evolved)
    assert all(len(set(r["responses"])) == 2 for r in answered)
    graded = Critique(lambda prompts: ["4", "Grade: 2.", "five", "10"] * (len(prompts) // 4))(answered)
    assert [r["grades"] for r in graded] == [[4, 2], [None, None]] * 2
    with pytest.raises(ValueError, match="ways: unknown 'colour'; accepted: clarity, difficulty, variety"):
        Evolve(scripted, ways=("colour",))


def test_a_model_for_each_kind():
    respond = Respond({"": lambda p: ["plain"] * len(p), "maths": lambda p: ["sums"] * len(p)}, samples=1)
    records = [{"instruction": "i", "kind": kind} for kind in ("maths", "prose", "maths")]
    assert [r["responses"] for r in respond(records)] == [["sums"], ["plain"], ["sums"]]
    with pytest.raises(ValueError, match="generate: has no model for instructions of kind 'prose'"):
        Respond({"maths": scripted})(records)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is\nAnswer: 42", "42"),
        ("**Final answer:** 1,000.0", "1000"),
        (r"hence $\boxed{x + 1}$.", "x + 1"),
        ("Answer: 3\nno, wait\nAnswer: Paris.", "paris"),
        ("The answer is not stated.", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


LONG = "this is a response of more than five words"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"responses": ["a\nAnswer: 1", "b\nAnswer: 2", "c\nAnswer: 2.0"]}, ("b\nAnswer: 2", "")),
        ({"responses": ["Answer: 1", "Answer: 2", "Answer: 3"]}, (None, "answers disagree")),
        ({"responses": [LONG, "Answer: 2", LONG + "!"]}, (LONG, "")),
        ({"responses": ["too few"]}, (None, "too short")),
        ({"responses": ["word " * 2001]}, (None, "too long")),
        ({"responses": ["one two three four " * 9]}, (None, "repeats itself")),
        ({"responses": ["Explain the colour  of the SKY."]}, (None, "copies the instruction")),
        ({"responses": [LONG, LONG + " yes"], "grades": [3, 4]}, (LONG + " yes", "")),
        ({"responses": [LONG], "grades": [2]}, (None, "grade")),
        ({"responses": [LONG], "grades": [None]}, (None, "grade")),
        ({"responses": []}, (None, "no response")),
    ],
)
def test_filters(record, expected):
    assert Filters().choose({"instruction": "Explain the colour of the sky.", **record}) == expected


def test_near_duplicates_and_counts():
    seen = NearDuplicates(0.7)
    text = "write a short story about a fox that learns to count the stars in winter"
    assert seen.add(text)
    assert not seen.add(text.upper())
    assert not seen.add(text + " nights")  # 13 of 14 triples
    assert seen.add("write a poem about a fox that learns to sing")
    assert seen.add("hi")
    assert not seen.add("Hi")
    rows = [{"instruction": i, "responses": [LONG], "kind": "k"} for i in (text, text, "another one entirely")]
    kept, reasons = select([*rows, {"instruction": "third", "responses": ["no"]}])
    assert [r["instruction"] for r in kept] == [text, "another one entirely"]
    assert kept[0] == {"kind": "k", "instruction": text, "response": LONG}
    assert reasons == {"near-duplicate": 1, "too short": 1}


def test_an_interrupted_step_goes_on(tmp_path):
    source = [{"n": i} for i in range(10)]
    calls = []

    def step(records, stop=None):
        calls.append([r["n"] for r in records])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return [{"n": r["n"], "twice": 2 * r["n"]} for r in records for _ in range(r["n"] % 2 + 1)]

    with pytest.raises(KeyboardInterrupt):
        run_step("double", lambda r: step(r, stop=3), source, tmp_path, batch_size=3)
    file = tmp_path / "double.jsonl"
    with file.open("a") as half:
        half.write('{"n": 6, "tw')
    assert run_step("double", step, source, tmp_path, batch_size=3) == file
    assert calls == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [6, 7, 8], [9]]
    assert [r["n"] for r in read_jsonl(file)] == [i for i in range(10) for _ in range(i % 2 + 1)]
    run_step("double", step, source, tmp_path, batch_size=3)
    assert len(calls) == 5
    file.write_text("")
    with pytest.raises(ValueError, match="is shorter than its progress says"):
        run_step("double", step, source, tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A byte-level Llama of random weights, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a few words to begin with"], vocab_size=260, special_tokens=["<end>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, eos_token_id=0, bos_token_id=0, initializer_range=0.5)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_local_model(model):
    generate = LocalModel(model, max_new_tokens=4)
    prompts = ["one", "a longer one than that"]
    answers = generate(prompts)
    assert len(answers) == 2
    assert answers == generate(prompts) != generate([p + " " for p in prompts])
    assert generate.greedy()(["one"]) == LocalModel(model, max_new_tokens=4, temperature=0.0)(["one"])


@pytest.fixture
def server(monkeypatch):
    """Answers by the prompt, after a refusal; what it was sent is in `seen`."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][0]["content"]
            first = prompt not in [p for p, _ in seen]
            seen.append((prompt, self.headers["Authorization"]))
            status = 400 if "forbidden" in prompt else 503 if first and "busy" in prompt else 200
            self.send_response(status)
            self.end_headers()
            content = f" Number {len(prompt)} is about the {prompt.split()[-1]} and {body['model']} "
            text = "3" if prompt.startswith("Grade") else content
            reply = {"oops": 1} if "odd" in prompt else {"choices": [{"message": {"content": text}}]}
            self.wfile.write(json.dumps(reply).encode())

        def log_message(self, *_):
            pass

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    http = ThreadingHTTPServer(("localhost", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://localhost:{http.server_port}/v1", seen
    http.shutdown()
    http.server_close()


def test_a_server(server):
    url, seen = server
    generate = Server(url, "m")
    generate.first_wait = 0.0
    assert generate(["to rain", "busy snow"]) == [
        "Number 7 is about the rain and m",
        "Number 9 is about the snow and m",
    ]
    assert len(seen) == 3
    assert seen[0][1] == "Bearer secret"
    with pytest.raises(ValueError, match=r"server: .*/v1/chat/completions answered 400 Bad Request"):
        generate(["forbidden"])
    with pytest.raises(ValueError, match="did not answer as a chat completion does"):
        generate(["odd"])
    nobody = Server("http://localhost:9", "m", attempts=2)
    nobody.first_wait = 0.0
    with pytest.raises(ValueError, match="after 2 attempts"):
        nobody(["x"])
    with pytest.raises(ValueError, match="server: expected an http address, got 'localhost'"):
        Server("localhost", "m")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))


def test_the_command(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url, seen = server
    write(tmp_path / "docs.jsonl", ["the rain", "the snow", "the wind"])
    command = ["hunyuan-moe", "synthesize", "docs.jsonl", "out.jsonl", "m", "--server", url, "--batch_size", "2"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "instruct: 9 records" in out
    rows = list(read_jsonl(tmp_path / "out.jsonl", "instruction", "response", "source", "kind"))
    assert 1 <= len(rows) <= 9
    assert f"filter: {len(rows)} kept" in out
    asked = len(seen)
    assert main(command) == 0
    assert len(seen) == asked  # all of it was there
    assert main([*command, "--samples", "2"]) == 2
    assert "samples: out.jsonl.work was begun with others" in capsys.readouterr().err


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "docs.jsonl", ["the rain"])
    (tmp_path / "link.jsonl").symlink_to("docs.jsonl")
    (tmp_path / "out.work").mkdir()
    write(tmp_path / "out.work" / "docs.jsonl", ["the snow"])
    before = (tmp_path / "docs.jsonl").read_bytes()
    for documents, output, message in [
        ("docs.jsonl", "docs.jsonl", "output: docs.jsonl would be overwritten; choose another"),
        ("docs.jsonl", "./link.jsonl", "output: docs.jsonl would be overwritten"),
        ("out.work/docs.jsonl", "out", "output: out.work/docs.jsonl would be overwritten"),
        ("docs.jsonl", "out.work", "output: out.work is a folder, expected a file"),
    ]:
        assert main(["hunyuan-moe", "synthesize", documents, output, "./m"]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "docs.jsonl").read_bytes() == before
    assert not (tmp_path / "docs.jsonl.work").exists()


def test_a_corrected_address_goes_on(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda _: None)
    write(tmp_path / "docs.jsonl", ["the rain", "the snow"])
    command = ["hunyuan-moe", "synthesize", "docs.jsonl", "out.jsonl", "--ways", "clarity, variety", "--samples", "2"]
    assert main([*command, "wrong", "--server", "http://localhost:9/v1"]) == 2
    assert "after 5 attempts" in capsys.readouterr().err
    assert main([*command, "m", "--server", server[0]]) == 0
    assert all(len(r["history"]) == 2 for r in read_jsonl(tmp_path / "out.jsonl.work" / "evolve.jsonl"))
    assert main([*command, "m", "--server", "http://localhost:9/v1"]) == 0  # all of it is there
    settings = tmp_path / "out.jsonl.work" / "settings.json"
    for damaged in ("{", "[]"):
        settings.write_text(damaged)
        assert main([*command, "m", "--server", server[0]]) == 2
        assert "out.jsonl.work/settings.json: is damaged; delete out.jsonl.work" in capsys.readouterr().err
    settings.unlink()
    (tmp_path / "out.jsonl.work" / "instruct.progress.json").write_text("")
    assert main([*command, "m", "--server", server[0]]) == 2
    assert "instruct.progress.json: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, [], "there is no file docs.jsonl"),
        ("[1]\n", [], "docs.jsonl, line 1: expected an object with text in 'text'"),
        ('{"text": "a"}\n{', [], "docs.jsonl, line 2: not JSON"),
        ('{"text": "a"}', ["--samples", "0"], "samples: must be from 1 to 100, got 0"),
        ('{"text": "a"}', ["--ways", "clarity,colour"], "unknown 'colour'; accepted: clarity, difficulty, variety"),
        ('{"text": "a"}', ["--temperature", "-1", "--samples", "1"], "temperature: must not be negative, got -1"),
        ('{"text": "a"}', ["--max_new_tokens", "0"], "max_new_tokens: must be from 1 to 1000000, got 0"),
        ("\n", [], "documents: there are none in docs.jsonl"),
        ('{"text": "a"}\n{"text": "é"}', [], "docs.jsonl, line 2: not UTF-8"),
        ('{"text": "a"}', ["--temperature", "0"], "temperature: several samples need one above 0"),
        ('{"text": "a"}', ["--server", "localhost"], "server: expected an http address, got 'localhost'"),
        ('{"text": "a"}', [], "./m"),
    ],
)
def test_bad_commands(text, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "docs.jsonl").write_text(text, encoding="latin-1")
    assert main(["hunyuan-moe", "synthesize", "docs.jsonl", "out.jsonl", "./m", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] in ([], ["docs.jsonl"])

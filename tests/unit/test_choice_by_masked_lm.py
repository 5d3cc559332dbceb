"""A blank and two texts for it: which tokens are masked, what a text's score is, and the loss."""

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig

from distprune.config import PruningConfig
from distprune.errors import UserError
from distprune.pruning.targets import targets_of
from tests.unit.task_files import CLS, PAD, SEP, WORDS, ids, make_masked_tokenizer, make_tokenizer

MASK = len(WORDS)
ROWS = [
    {"sentence": "a b _ c", "option1": "d", "option2": "e f", "answer": "2"},
    {"sentence": "_ a", "option1": "g h i", "option2": "b", "answer": "1"},
]
OPTIONS = {"name": "choice_by_masked_lm", "choices": ["option1", "option2"], "label": "answer", "labels": ["1", "2"]}
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture
def blanks(build):
    """Return a function that builds the task from sentences with a blank."""

    def run(rows=ROWS, held=ROWS, tokenizer=None, **options):
        return build(rows, held, tokenizer=tokenizer or make_masked_tokenizer(), **(OPTIONS | options))

    return run


def test_a_choice_is_masked_token_by_token(blanks):
    task = blanks()
    before, word = [CLS, *map(WORDS.index, "ab")], WORDS.index
    assert task.train[0] == {
        "input_ids": [[*before, MASK, word("c"), SEP], [*before, MASK, MASK, word("c"), SEP]],
        "token_type_ids": [[0] * 6, [0] * 7],
        "targets": [[-100] * 3 + [word("d")] + [-100] * 2, [-100] * 3 + [word("e"), word("f")] + [-100] * 2],
        "label": 1,
        "length": 7,
        "_row": 0,
    }
    batch = task.collate([task.train[0], task.train[1]])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 2, 7),
        "token_type_ids": (2, 2, 7),
        "attention_mask": (2, 2, 7),
        "targets": (2, 2, 7),
        "labels": (2,),
    }
    assert batch["input_ids"][0, 0].tolist() == [*before, MASK, word("c"), SEP, PAD]
    assert batch["targets"][1, 1].tolist() == [-100, word("b")] + [-100] * 5


def byte_pairs() -> PreTrainedTokenizerFast:
    """Return a tokenizer as RoBERTa's, whose tokens begin with the space before a word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(["Sarah gave the cup to Maria because she was kind."], trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **names)


@pytest.mark.parametrize(
    ("sentence", "option", "masked"),
    [
        ("the cup to _ because", "Maria", " Maria"),
        ("_ gave the cup", "Sarah", "Sarah"),
        ("the cup of _'s", "Zoë", " Zoë"),
    ],
)
def test_the_space_before_a_choice_is_its_own(blanks, sentence, option, masked):
    tokenizer = byte_pairs()
    rows = [{"sentence": sentence, "option1": option, "option2": "she", "answer": "1"}]
    row = blanks(rows, rows, tokenizer).train[0]
    hidden = [token for token in row["targets"][0] if token >= 0]
    assert tokenizer.decode(hidden) == masked
    assert hidden == tokenizer(masked, add_special_tokens=False)["input_ids"], "as if it stood alone"
    assert row["input_ids"][0].count(tokenizer.mask_token_id) == len(hidden)
    pairs = zip(row["input_ids"][0], row["targets"][0], strict=True)
    whole = [target if target >= 0 else token for token, target in pairs]
    assert tokenizer.decode(whole, skip_special_tokens=True) == sentence.replace("_", option)


def test_a_long_sentence_is_cut_around_its_blank(blanks):
    rows = [{"sentence": "a b c d _ e f g h", "option1": "i", "option2": "i j", "answer": "1"}]
    task = blanks(rows, rows, max_length=6)
    word = WORDS.index
    assert task.train["input_ids"][0] == [
        [CLS, word("d"), MASK, word("e"), word("f"), SEP],
        [CLS, word("d"), MASK, MASK, word("e"), SEP],
    ]
    assert task.notes[0].endswith("have more than task.max_length 6 tokens: row 1; cut short")
    end = [{"sentence": "a b c d e _", "option1": "i", "option2": "f g h i j", "answer": "1"}]
    cut = blanks(end, end, max_length=6).train[0]
    assert cut["input_ids"] == [[CLS, *map(word, "cde"), MASK, SEP], [CLS, *[MASK] * 4, SEP]]
    assert cut["targets"][1] == [-100, *map(word, "fghi"), -100]


def test_scores_are_mean_log_probabilities_and_the_loss_that_of_fairseq(blanks):
    torch.manual_seed(0)
    task = blanks()
    model = task.auto_class.from_config(BertConfig(vocab_size=MASK + 1, **SIZES)).eval()
    batch = task.collate([task.train[0], task.train[1]])
    scores = task.forward(model, batch)
    expected = torch.zeros(2, 2)
    for row in range(2):
        for choice in range(2):
            given, targets = (task.train[row][name][choice] for name in ("input_ids", "targets"))
            found = F.log_softmax(model(torch.tensor([given])).logits[0], dim=-1)
            places = [place for place, target in enumerate(targets) if target >= 0]
            expected[row, choice] = sum(found[place, targets[place]] for place in places) / len(places)
    assert torch.allclose(scores, expected, atol=1e-5)
    q, c = scores[[0, 1], [1, 0]], scores[[0, 1], [0, 1]]
    expected_loss = sum(-q[i] + 5 * max(0, c[i] - q[i] + 0.4) for i in range(2)) / 2
    assert torch.allclose(task.loss(scores, batch), expected_loss)
    far = torch.tensor([[-9.0, -1.0], [-2.0, -9.0]])
    assert task.loss(far, batch).item() == pytest.approx(1.5), "no margin is missed"
    task.loss(scores, batch).backward()
    assert model.bert.embeddings.word_embeddings.weight.grad.abs().sum() > 0
    assert torch.equal(task.join(task.split(scores, batch), batch), scores)
    assert task.metrics(far, task.train) == {"accuracy": 1.0}


def test_scores_of_a_bf16_model_are_float32(blanks):
    task = blanks()
    model = task.auto_class.from_config(BertConfig(vocab_size=MASK + 1, **SIZES)).bfloat16().eval()
    assert task.forward(model, task.collate([task.train[0]])).dtype == torch.float32


def test_rows_that_cannot_be_used_are_refused_or_left_out(blanks):
    for change, message in [
        ({"sentence": "a b"}, "1 of 3 rows of train.jsonl have not one blank, '_', in column 'sentence': row 3"),
        ({"sentence": "_ b _"}, "have not one blank"),
        ({"option1": ""}, "have not 2 choices with text in option1, option2"),
        ({"option1": "\u200b"}, "have a choice without tokens"),
        ({"answer": ""}, "have an answer in column 'answer' that is none of 1, 2: row 3"),
    ]:
        rows = [*ROWS, ROWS[0] | change]
        with pytest.raises(UserError, match=message):
            blanks(rows, tokenizer=seeing())
        task = blanks(rows, tokenizer=seeing(), bad_rows="skip")
        assert (len(task.train), len(task.notes)) == (2, 1)


def seeing() -> PreTrainedTokenizerFast:
    """Return a tokenizer that drops what cannot be seen."""
    tokenizer = make_masked_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(clean_text=True)
    return tokenizer


def test_settings_that_cannot_be_used(blanks):
    three = [row | {"option3": "a"} for row in ROWS]
    lists = {"choices": ["option1", "option2", "option3"], "labels": ["1", "2", "3"]}
    for rows, options, message in [
        (ROWS, {"tokenizer": make_tokenizer()}, "has no mask token; allowed: that of a masked language model"),
        (three, lists, "task.choices gives 3 choices; allowed for choice_by_masked_lm: 2"),
        (ROWS, {"text": ["sentence", "option1"]}, "allowed for choice_by_masked_lm: one column"),
    ]:
        with pytest.raises(UserError, match=message):
            blanks(rows, rows, **options)


def test_a_tied_output_matrix_is_pruned_once(blanks):
    model = blanks().auto_class.from_config(RobertaConfig(vocab_size=MASK + 1, **SIZES))
    assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
    names = targets_of(PruningConfig(include=[r"word_embeddings|lm_head\.decoder\.weight"]), model)
    assert names == ["roberta.embeddings.word_embeddings.weight"]


def test_words_have_the_numbers_that_these_tests_assume():
    assert make_masked_tokenizer().mask_token_id == MASK
    assert make_masked_tokenizer()("a")["input_ids"] == ids("a")

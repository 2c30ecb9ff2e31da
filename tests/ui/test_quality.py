"""What the page says of an encoder's vectors, from its model card."""

import pytest

from ui.search.quality import quality_html, run_of, sentence, title, titles

RUN = {"id": "tiny-0123456789ab", "architecture": "tiny", "training": {"data": "clothes", "epochs": 3}}
BEFORE_AFTER = {
    "before": {"knn": 0.24, "k": 20, "bank": 1000, "queries": 372},
    "after": {"knn": 0.8237, "k": 20, "bank": 1000, "queries": 372},
}
BY_LABEL = "of 372 pictures of clothes, 82 % have the right label by their 20 nearest ones"


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (BEFORE_AFTER, f"{BY_LABEL}; 24 % before training"),
        (BEFORE_AFTER | {"before": {}}, BY_LABEL),
        (
            {"before": {"views_matched": 0.05, "pictures": 80}, "after": {"views_matched": 0.43, "pictures": 80}},
            "of 80 pictures of clothes, 43 % are found by a random view of them, as training draws them; "
            "5 % before training",
        ),
        (
            {"after": {"agreement": 0.62, "pictures": 500, "MB": 1}},
            "of the ten nearest of each of 500 pictures of clothes, 62 % are the same as its teacher's",
        ),
        ({"after": {"agreement": 0.6, "pictures": 5} | BEFORE_AFTER["after"]}, BY_LABEL),
        (
            BEFORE_AFTER | {"measured": {"data": "shoes", "knn": 0.9, "k": 1, "queries": 1, "bank": 4}},
            "of 1 picture of shoes, 90 % have the right label by their nearest one",
        ),
        (
            BEFORE_AFTER | {"measured": {"data": "shoes", "found_first": 0.5, "judged": 1200}},
            "of 1,200 pictures of shoes, 50 % come first when they are searched by a changed view of them",
        ),
        (
            BEFORE_AFTER | {"quantized": {"data": "shoes", "asked": 70, "knn": 0.8, "knn_original": 0.81}},
            "of 70 pictures of shoes, 80 % have the right label by their nearest ones; 81 % before the encoder was "
            "made smaller",
        ),
        (
            {"quantized": {"data": "shoes", "pictures": 70, "neighbours_kept": 0.964}},
            "of the ten nearest of each of 70 pictures of shoes, 96 % stayed the same when the encoder was made "
            "smaller",
        ),
        *[
            (figures, "nothing is known yet about how good these vectors are")
            for figures in ({}, {"parity_error": 1e-6}, {"after": {"test": {"accuracy": 0.9}}})
        ],
    ],
)
def test_each_figure_is_said_with_the_pictures_it_was_measured_on(figures, words):
    said = sentence(RUN | {"figures": figures})
    assert said == words or (words.startswith("nothing") and said.startswith(words))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"epochs": 3}, "tiny, trained from nothing"),
        ({"epochs": 0}, "tiny"),
        ({"origin": "lite0"}, "tiny, as published"),
        ({"origin": "lite0", "epochs": 0}, "tiny, as published"),
        ({"origin": "lite0", "epochs": 5}, "tiny, trained further"),
        ({"origin": "scratch, taught by x", "epochs": 5, "distillation": {"tau": 1}}, "tiny, distilled"),
        ({"origin": "x", "epochs": 5, "finetuning": {"mode": "all"}}, "tiny, fine-tuned"),
    ],
)
def test_a_title_says_how_an_encoder_came_about(training, words):
    assert title(RUN | {"training": training}) == words
    assert title(RUN | {"training": training, "precision": "int8"}) == f"{words}, int8"


def test_equal_titles_are_told_apart_and_each_shown_encoder_has_its_line():
    other, lite0 = RUN | {"id": "tiny-ba9876543210"}, RUN | {"id": "lite0-1", "architecture": "<b>"}
    cards = [RUN | {"figures": BEFORE_AFTER}, other, lite0]
    assert list(titles(cards).values()) == [
        "tiny, trained from nothing (6789ab)",
        "tiny, trained from nothing (543210)",
        "<b>, trained from nothing",
    ]
    html = quality_html(cards, [RUN["id"], "lite0-1", "lite0-1", "", "gone"])
    assert html.count('<p class="quality">') == 2
    assert f"(6789ab): {BY_LABEL}; 24 % before training.</p>" in html
    assert "&lt;b&gt;, trained from nothing: nothing is known" in html and "<b>" not in html
    assert "<code>python training/evaluate.py runs/NAME/encoder --data ~/Pictures</code>" in html


def test_equal_titles_have_the_names_of_their_runs():
    def card(id: str, **training) -> dict:
        return {"id": id, "architecture": "tiny", "training": {"epochs": 5} | training}

    cards = [card("a", settings={"name": "first"}), card("b", settings={"name": "second"}), card("c-123456")]
    words = [f"tiny, trained from nothing ({end})" for end in ("first", "second", "123456")]
    assert list(titles(cards).values()) == words
    student = card("d", settings={"name": "teacher"}, distillation={"name": "student"})
    assert run_of(student) == "student" and run_of(cards[2]) == ""


def test_a_card_of_another_service_needs_an_id_only():
    assert '<p class="quality">fake: nothing is known' in quality_html([{"id": "fake"}], ["fake"])


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            {"measured": {"data": "shoes", "found_first": 0.02, "judged": 500}},
            "hardly better than chance: 2 % come first",
        ),
        ({"measured": {"data": "shoes", "found_first": 0.5, "judged": 500}}, ""),
        ({"measured": {"data": "s", "knn": 0.18, "k": 1, "queries": 9, "chance": 0.1}}, "hardly better than chance"),
        (
            {"measured": {"data": "s", "knn": 0.605, "k": 1, "queries": 9, "chance": 0.1, "pixels": 0.6}},
            "hardly better than those of raw pixels: 60 % have the right label by their nearest ones, and 60 % with",
        ),
        ({"measured": {"data": "s", "knn": 0.8, "k": 1, "queries": 9, "chance": 0.1, "pixels": 0.6}}, ""),
        (
            {"before": {"knn": 0.667}, "after": {"knn": 0.667, "k": 1, "queries": 9}},
            "training has not made its neighbours",
        ),
        (BEFORE_AFTER, ""),
        ({"before": {}, "after": {"views_matched": 0.05, "pictures": 80}}, "by chance it would be 1 %"),
        ({}, ""),
    ],
)
def test_a_warning_stands_where_neighbours_mean_little(figures, words):
    html = quality_html([RUN | {"figures": figures}], [RUN["id"]])
    assert words in html if words else 'class="doubt"' not in html, html
    assert html.count('class="quality"') == 1

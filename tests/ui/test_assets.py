from ui.assets import FOLDER, style_sheet

SOURCES = "".join(file.read_text() for file in FOLDER.rglob("*.py"))


def test_every_style_sheet_is_part_of_the_page_and_general_rules_come_first():
    sheets = {file: file.read_text() for file in FOLDER.rglob("*.css")}
    css = style_sheet()
    assert len(sheets) > 10 and all(sheet in css for sheet in sheets.values())
    assert css.startswith(sheets[FOLDER / "style.css"])
    places = {folder: css.index(sheets[FOLDER / folder]) for folder in ("widgets/grid.css", "tabs/similar.css")}
    assert places["widgets/grid.css"] < places["tabs/similar.css"]


def test_every_script_is_used():
    names = [file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.js")]
    assert len(names) > 10
    assert [name for name in names if f'"{name}"' not in SOURCES and f"'{name}'" not in SOURCES] == []

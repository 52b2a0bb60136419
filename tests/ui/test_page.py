"""`overpaint ui` in a real browser: what a visitor switches is what is drawn, and nobody's switches reach another."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from PIL import Image

import overpaint
from overpaint.patches.inspect import inspect
from overpaint.workspace.workspace import Workspace
from tests.ui.browser import chromium
from tests.ui.conftest import GRADIO

pytest.importorskip("gradio", reason="the page needs Gradio: pip install 'overpaint[ui]'")
pytest.importorskip("playwright", reason="a browser is driven by Playwright: pip install 'overpaint[dev]'")

from playwright.sync_api import Browser, Page, Route, expect

from overpaint.ui import served

pytestmark = GRADIO

SLOW = 240_000
"""Milliseconds that a picture may take on a busy machine."""
BASE, PATCHED = 0, 1
"""Columns of a sheet."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=SLOW)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def registry(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes on the tiny base: `safe` with cat and dog, `empty` with nothing."""
    folder = tmp_path_factory.mktemp("ui") / "registry"
    workspace = overpaint.open(folder)
    workspace.add_base("tiny", base_folder)
    workspace.create_recipe("empty")
    recipe = workspace.create_recipe("safe")
    for name in ("cat", "dog"):
        # Stronger than one would: on random weights an erasure at strength 1 changes few of the 768 pixels.
        recipe.add(workspace.solve(name, solver="uce"), 2.0, why=f"takedown of {name}")
    return folder


@pytest.fixture(scope="module")
def page_address(registry: Path) -> Iterator[str]:
    with served(Workspace.open(registry)) as address:
        yield address


@contextmanager
def tab(browser: Browser, address: str, recipe: str = "safe", **look: object) -> Iterator[Page]:
    """A new visitor with the recipe open; fails on errors of the page, and when it asks anything of other servers."""
    errors: list[str] = []
    # Visitors who look alike share a context, so that the page's scripts are fetched and compiled once.
    context = browser.contexts[0] if browser.contexts and not look else browser.new_context(**look)  # type: ignore[arg-type]
    page = context.new_page()
    page.set_default_timeout(SLOW)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: None if _is_local(request.url, address) else errors.append(request.url))
    page.goto(address)
    expect(page.locator("#status")).to_contain_text("revision")
    if recipe not in page.locator("#status").inner_text():
        choose(page, "Recipe", recipe)
        expect(page.locator("#status")).to_contain_text(recipe)
    expect(page.locator("#sheet thead")).to_contain_text(recipe)
    try:
        yield page
        assert not errors
    finally:
        (context if look else page).close()


def _is_local(url: str, address: str) -> bool:
    return url.startswith((address, "data:", "blob:"))


def choose(page: Page, label: str, value: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=value).first.click()


def pictures(page: Page) -> list[bytes]:
    """The pixels of the sheet's pictures, once none of them waits."""
    expect(page.locator("#sheet img").first).to_be_visible()
    expect(page.locator("#sheet .op-waits")).to_have_count(0)
    sources = page.locator("#sheet img").evaluate_all("all => all.map(each => each.src)")
    files = [BytesIO(page.request.get(source).body()) for source in sources]
    return [Image.open(file).convert("RGB").tobytes() for file in files]


def switch_off(page: Page, concept: str) -> None:
    """Switch a patch off, and wait until pictures follow: on a busy machine, the server may receive the next click first."""
    # `uncheck` fails if the box is still on right after the click, and an older list may show it on for a moment.
    page.get_by_label(concept, exact=True).click()
    expect(page.locator("#sheet")).to_contain_text("as switched")
    expect(page.get_by_label(concept, exact=True)).not_to_be_checked()


def test_a_switch_changes_the_next_picture_and_restoring_brings_back_the_bases(
    browser: Browser, page_address: str
) -> None:
    with tab(browser, page_address) as page:
        both = pictures(page)
        assert both[BASE] != both[PATCHED]
        switch_off(page, "cat")
        expect(page.locator("#sheet")).to_contain_text("safe, as switched")
        only_dog = pictures(page)
        assert only_dog[BASE] == both[BASE]
        assert only_dog[PATCHED] not in both
        page.get_by_role("button", name="All off").click()
        expect(page.locator("#sheet").get_by_text("the base’s own weights")).to_have_count(2)
        restored = pictures(page)
        assert restored[PATCHED] == restored[BASE] == both[BASE]


def test_switches_and_strengths_are_set_by_keyboard(browser: Browser, page_address: str) -> None:
    with tab(browser, page_address) as page:
        before = pictures(page)
        page.get_by_role("slider", name="Strength of dog").focus()
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#sheet")).to_contain_text("safe, as switched")
        after = pictures(page)
        assert after[BASE] == before[BASE]
        assert after[PATCHED] != before[PATCHED]
        page.get_by_label("cat", exact=True).focus()
        page.keyboard.press("Space")
        expect(page.get_by_label("cat", exact=True)).not_to_be_checked()


def test_two_tabs_do_not_disturb_each_other(browser: Browser, page_address: str) -> None:
    with tab(browser, page_address) as one, tab(browser, page_address) as other:
        before = pictures(one)
        other.get_by_role("button", name="All off").click()
        expect(other.locator("#sheet").get_by_text("the base’s own weights")).to_have_count(2)
        assert pictures(other) == [before[BASE]] * 2
        one.get_by_label("Prompts, one per line").fill("a photo of a cat\na photo of a dog")
        one.get_by_role("button", name="Draw", exact=True).click()
        expect(one.locator("#sheet img")).to_have_count(4)
        assert pictures(one)[:2] == before
        expect(one.get_by_label("cat", exact=True)).to_be_checked()


def test_other_recipes_and_revisions_stand_beside_it(browser: Browser, page_address: str) -> None:
    with tab(browser, page_address) as page:
        page.get_by_role("button", name="Seeds, steps and other recipes").click()
        for name in ("empty", "safe@1"):
            page.get_by_label("Other recipes beside it").fill(name)
            page.keyboard.press("Enter")
        page.get_by_label("Prompts, one per line").fill("a photo of a cat\na photo of a dog")
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.locator("#sheet img")).to_have_count(8)
        base, safe, empty, first = pictures(page)[4:]
        assert base == empty
        assert len({base, safe, first}) == 3


def test_the_history_says_who_and_why_and_undo_and_restore_change_the_registry(
    browser: Browser, page_address: str, registry: Path
) -> None:
    workspace = Workspace.open(registry)
    copy = workspace.recipe("safe").copy("history")
    with tab(browser, page_address, "history") as page:
        page.get_by_role("button", name="Keep these switches").click()
        page.get_by_label("Why").first.fill("licence <deal>")
        switch_off(page, "cat")
        expect(page.get_by_label("Why").first).to_have_value("licence <deal>")
        page.get_by_role("button", name="Make the next revision").click()
        expect(page.locator("#status")).to_contain_text("erases dog.")
        assert [patch.concept for patch, _ in copy.patches()] == ["dog"]
        page.get_by_role("tab", name="History").click()
        newest = page.locator("#history li").first
        expect(newest).to_contain_text("removed cat")
        expect(newest).to_contain_text("licence <deal>")
        expect(newest).to_contain_text(copy.log()[-1].who)
        page.get_by_role("button", name="Undo the newest change").click()
        expect(page.locator("#status")).to_contain_text("erases cat, dog.")
        assert copy.record.patches == workspace.recipe("safe").record.patches
        choose(page, "Earlier revision", "0: as it was made")
        page.get_by_role("button", name="Restore it").click()
        expect(page.locator("#status")).to_contain_text("the base")
    assert copy.digest() == copy.base.fingerprint


def test_a_recipe_that_somebody_else_changed_is_not_overwritten(
    browser: Browser, page_address: str, registry: Path
) -> None:
    copy = Workspace.open(registry).recipe("safe").copy("shared")
    with tab(browser, page_address, "shared") as page:
        copy.remove("dog")
        switch_off(page, "cat")
        page.get_by_role("button", name="Keep these switches").click()
        page.get_by_role("button", name="Make the next revision").click()
        expect(page.get_by_text("look at what changed and try again")).to_be_visible()
    assert [patch.concept for patch, _ in copy.patches()] == ["cat"]


def test_solving_adds_a_patch_and_the_heat_map_shows_what_it_does_to_the_others(
    browser: Browser, page_address: str, registry: Path
) -> None:
    copy = Workspace.open(registry).recipe("safe").copy("growing")
    with tab(browser, page_address, "growing") as page:
        page.get_by_role("tab", name="Erase").click()
        page.get_by_label("Concept", exact=True).fill("fox")
        choose(page, "Solver", "uce:")
        page.get_by_role("button", name="Solve").click()
        expect(page.locator("#solved")).to_contain_text("in growing since revision 2")
        expect(page.locator("#status")).to_contain_text("erases cat, dog, fox.")
        page.get_by_role("tab", name="Cross-talk").click()
        page.get_by_role("button", name="Measure").click()
        expect(page.locator("#crosstalk tbody tr")).to_have_count(3)
        expect(page.locator("#crosstalk tbody tr").first.locator("td")).to_have_count(3)
    assert [patch.concept for patch, _ in copy.patches()] == ["cat", "dog", "fox"]


def test_a_checkpoint_and_a_lora_are_built_and_downloaded(
    browser: Browser, page_address: str, registry: Path, tmp_path: Path
) -> None:
    with tab(browser, page_address) as page:
        page.get_by_role("tab", name="Download").click()
        for what, told in (("Checkpoint, one .safetensors file", "Weights "), ("LoRA for comfyui", "kohya: ")):
            choose(page, "What", what)
            page.get_by_role("button", name="Build").click()
            expect(page.locator("#built")).to_contain_text(told)
            with page.expect_download() as download:
                page.locator("#built a").click()
            file = tmp_path / f"{what}.safetensors"
            download.value.save_as(file)
            assert safetensors.torch.load_file(file)
    inspected = inspect(tmp_path / "Checkpoint, one .safetensors file.safetensors")
    assert {patch["concept"] for patch in inspected.patches} == {"cat", "dog"}
    assert inspected.sound


def test_it_fits_a_phone_and_follows_the_visitors_colours(browser: Browser, page_address: str) -> None:
    for scheme, is_light in (("light", True), ("dark", False)):
        with tab(browser, page_address, viewport={"width": 390, "height": 844}, color_scheme=scheme) as page:
            pictures(page)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper)[:3])) > 384) == is_light


def test_elsewhere_it_asks_for_a_password_and_the_history_has_the_visitors_name(
    browser: Browser, registry: Path
) -> None:
    workspace = Workspace.open(registry)
    recipe = workspace.create_recipe("behind-a-password")
    recipe.add("cat")
    with served(workspace, host="0.0.0.0", password="a long one") as address:
        here = address.replace("0.0.0.0", "127.0.0.1")
        page = browser.new_page()
        page.goto(here)
        for word, admitted in (("a wrong one", False), ("a long one", True)):
            page.get_by_label("username").fill("Vera")
            page.get_by_label("password").fill(word)
            page.get_by_role("button", name="Login").click()
            shown = page.locator("#status") if admitted else page.get_by_text("Incorrect Credentials")
            expect(shown).to_be_visible()
        choose(page, "Recipe", "behind-a-password")
        expect(page.locator("#status")).to_contain_text("behind-a-password")
        page.get_by_role("tab", name="History").click()
        page.get_by_role("button", name="Undo the newest change").click()
        expect(page.locator("#history")).to_contain_text("Vera")
        page.close()
    assert recipe.log()[-1].who == "Vera"


@contextmanager
def held(page: Page, is_meant: Callable[[list[Any]], bool]) -> Iterator[list[Route]]:
    """The first event whose data are meant comes to the server when the block ends: after what was pressed within it."""
    found: list[Route] = []

    def hold(route: Route) -> None:
        if not found and is_meant(json.loads(route.request.post_data or "")["data"]):
            found.append(route)
        else:
            route.continue_()

    page.route("**/queue/join*", hold)
    yield found
    with page.expect_response(lambda answer: answer.request == found[0].request) as answer:
        found[0].continue_()
    assert answer.value.ok
    page.unroute_all(behavior="ignoreErrors")


def show_the_list_again(page: Page) -> None:
    """Another list, and another, with everything on."""
    page.get_by_role("button", name="All off (the base)").click()
    expect(page.get_by_label("dog", exact=True)).not_to_be_checked()
    page.get_by_role("button", name="All on").click()
    expect(page.get_by_label("dog", exact=True)).to_be_checked()


def test_a_switch_pressed_while_the_list_is_shown_again_is_not_lost(
    browser: Browser, page_address: str, registry: Path
) -> None:
    Workspace.open(registry).recipe("safe").copy("late")
    with tab(browser, page_address, "late") as page:
        with held(page, lambda data: data[-1] is False):
            page.get_by_label("cat", exact=True).click()
            show_the_list_again(page)
        expect(page.get_by_label("cat", exact=True)).not_to_be_checked()
        expect(page.locator("#sheet")).to_contain_text("late, as switched")


def test_a_strength_set_while_the_list_is_shown_again_is_not_lost(
    browser: Browser, page_address: str, registry: Path
) -> None:
    Workspace.open(registry).recipe("safe").copy("slow")
    with tab(browser, page_address, "slow") as page:
        slider = page.get_by_role("slider", name="Strength of dog")
        with held(page, lambda data: data[-1] == 1.95):
            slider.focus()
            page.keyboard.press("ArrowLeft")
            show_the_list_again(page)
        expect(slider).to_have_value("1.95")
        expect(page.locator("#sheet")).to_contain_text("slow, as switched")


def test_what_was_pressed_in_one_recipe_does_not_change_another(
    browser: Browser, page_address: str, registry: Path
) -> None:
    Workspace.open(registry).recipe("safe").copy("next")
    with tab(browser, page_address) as page:
        with held(page, lambda data: data[-1] is False):
            page.get_by_label("cat", exact=True).click()
            choose(page, "Recipe", "next")
            expect(page.locator("#sheet thead")).to_contain_text("next")
            expect(page.get_by_label("cat", exact=True)).to_be_checked()
        page.get_by_role("button", name="Draw", exact=True).click()
        expect(page.get_by_label("cat", exact=True)).to_be_checked()
        assert "as switched" not in page.locator("#sheet").inner_text()


def test_the_list_has_as_many_lines_as_the_recipe_has_patches_that_match(browser: Browser, page_address: str) -> None:
    with tab(browser, page_address) as page:
        switches = page.locator("#patches input[type=checkbox]")
        expect(switches).to_have_count(2)
        page.get_by_role("button", name="Other patches").click()
        page.get_by_label("Show only").fill("dog")
        expect(switches).to_have_count(1)
        expect(page.get_by_label("dog", exact=True)).to_be_visible()
        switch_off(page, "dog")
        page.get_by_label("Show only").fill("")
        expect(switches).to_have_count(2)
        expect(page.get_by_label("cat", exact=True)).to_be_checked()
        expect(page.get_by_label("dog", exact=True)).not_to_be_checked()
        choose(page, "Recipe", "empty")
        expect(page.get_by_text("No patch is in this recipe yet")).to_be_visible()
        expect(switches).to_have_count(0)


def test_two_switches_pressed_at_once_are_both_drawn(browser: Browser, page_address: str) -> None:
    with tab(browser, page_address) as page:
        expect(page.locator("#patches input[type=checkbox]")).to_have_count(2)
        page.locator("#patches").evaluate(
            "it => it.querySelectorAll('input[type=checkbox]').forEach(box => box.click())"
        )
        expect(page.locator("#sheet").get_by_text("the base’s own weights")).to_have_count(2)

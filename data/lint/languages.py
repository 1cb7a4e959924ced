"""What a text is written in, by simple evidence: the programming language and the script."""

from __future__ import annotations

import re
from collections import Counter

# Signs that hardly any other language has; each counts as two.
_SIGNS = {
    "Python": ("self.", "__init__", "elif ", "if __name__", "print(f", " is not None"),
    "JavaScript": ("console.log(", "=== ", "require(", "document.", "module.exports", "=> {"),
    "TypeScript": (": string", ": number", "interface ", "export type ", ": void {"),
    "Java": ("public static void", "System.out.", "import java", "@Override", "new ArrayList"),
    "C#": ("using System", "Console.Write", "namespace ", "public async Task", "string.Format"),
    "C": ("#include <std", "#include <string", "printf(", "malloc(", "#define ", "->"),
    "C++": ("std::", "#include <iostream", "#include <vector", "cout <<", "template <", "nullptr"),
    "Go": ("fmt.", "func (", " := ", "if err != nil", "package main"),
    "Rust": ("println!(", "let mut ", "pub fn ", "impl ", "&mut ", "Vec<", ".unwrap()"),
    "PHP": ("<?php", "$this->", "echo $", "function($"),
    "Ruby": ("puts ", ".each do", "attr_accessor", "require '", "end\n\n", ".nil?"),
    "Shell": ("#!/bin/sh", "#!/bin/bash", "echo \"$", "\nfi\n", "\ndone", "if [ ", "$("),
    "SQL": ("SELECT ", " FROM ", "INSERT INTO", "CREATE TABLE", " WHERE "),
    "HTML": ("<html", "<div", "</p>", "<head", "<!DOCTYPE", "</a>"),
    "Kotlin": ("fun main(", "println(", "val ", "?.let", "data class "),
    "Swift": ("import Foundation", "guard let", "if let ", "func ", "var body: some"),
}  # fmt: skip
# First words of lines, each with the languages that begin lines so; each line counts as one.
_FIRST_WORDS = {
    "def": ("Python", "Ruby"), "import": ("Python", "Java", "Go", "Kotlin"), "from": ("Python",),
    "class": ("Python", "Java"), "elif": ("Python", "Shell"), "return": ("Python",),
    "raise": ("Python", "Ruby"), "with": ("Python",), "except": ("Python",), "async": ("Python",),
    "const": ("JavaScript", "TypeScript"), "let": ("JavaScript", "Rust"),
    "function": ("JavaScript", "PHP"), "export": ("TypeScript", "JavaScript"),
    "public": ("Java", "C#"), "private": ("Java", "C#"), "protected": ("Java", "C#"),
    "func": ("Go", "Swift"), "package": ("Go", "Java", "Kotlin"), "type": ("Go", "TypeScript"),
    "fn": ("Rust",), "pub": ("Rust",), "use": ("Rust", "PHP"), "impl": ("Rust",),
    "#include": ("C", "C++"), "#define": ("C", "C++"), "int": ("C", "C++"), "void": ("C", "C++"),
    "struct": ("C", "C++"), "template": ("C++",), "namespace": ("C++", "C#"), "using": ("C#",),
    "fi": ("Shell",), "done": ("Shell",), "then": ("Shell",), "echo": ("Shell", "PHP"),
    "end": ("Ruby",), "module": ("Ruby",), "fun": ("Kotlin",), "val": ("Kotlin",),
    "SELECT": ("SQL",), "INSERT": ("SQL",), "CREATE": ("SQL",), "FROM": ("SQL",),
    "WHERE": ("SQL",),
}  # fmt: skip
_BRACED = {"JavaScript", "TypeScript", "Java", "C#", "C", "C++", "PHP", "Rust", "Go"}
# As much of a text is looked at as its first lines.
_MOST_CHARACTERS, _MOST_LINES = 2000, 50
_ENOUGH = 2
_SCRIPTS = {
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff",
    "Greek": "\u0370-\u03ff",
    "Cyrillic": "\u0400-\u052f",
    "Hebrew": "\u0590-\u05ff",
    "Arabic": "\u0600-\u06ff\u0750-\u077f",
    "Devanagari": "\u0900-\u097f",
    "Bengali": "\u0980-\u09ff",
    "Tamil": "\u0b80-\u0bff",
    "Thai": "\u0e00-\u0e7f",
    "Kana": "\u3040-\u30ff",
    "Han": "\u3400-\u4dbf\u4e00-\u9fff",
    "Hangul": "\u1100-\u11ff\uac00-\ud7af",
}
_LETTERS = {name: re.compile(f"[{ranges}]") for name, ranges in _SCRIPTS.items()}
# Of the letters; less is a name or a quotation.
_LEAST_SHARE = 0.1


def programming_language(text: str) -> str | None:
    """Return the language with the most evidence in a text's beginning, None where it has none."""
    text = text[:_MOST_CHARACTERS]
    score: Counter[str] = Counter()
    ends_braced = ends_colon = 0
    for line in text.split("\n", _MOST_LINES)[:_MOST_LINES]:
        word = line.split(None, 1)[:1]
        for language in _FIRST_WORDS.get(word[0], ()) if word else ():
            score[language] += 1
        ends_braced += line.endswith((";", "{"))
        ends_colon += line.endswith(":")
    # Where words speak of some, the others are not asked for their signs.
    for language in list(score) or _SIGNS:
        score[language] += 2 * sum(sign in text for sign in _SIGNS[language])
    # Half of what tells languages apart stands at the ends of their lines.
    for language in score:
        if score[language]:
            score[language] += min(3, ends_braced if language in _BRACED else 0)
            score[language] += min(3, ends_colon if language == "Python" else 0)
    best = max(score, key=score.__getitem__)
    return best if score[best] > _ENOUGH else None


def scripts(text: str) -> list[str]:
    """Return the scripts of a text that have a tenth of its letters or more, the first most."""
    if text.isascii():
        return ["Latin"] if _LETTERS["Latin"].search(text) else []
    letters = {name: len(pattern.findall(text)) for name, pattern in _LETTERS.items()}
    least = _LEAST_SHARE * sum(letters.values())
    common = [name for name, number in letters.items() if number and number >= least]
    return sorted(common, key=letters.__getitem__, reverse=True)

"""What a caption of stage 2 may not hold, as regular expressions.

The paper filters the captions of stage 2 by completeness, readability, gibberish, boilerplate (menus, error messages,
repeated text), offensive language, placeholder text and source code, and publishes no rule for any of them: these are
this package's choice, made for captions of any language. Expressions are in the syntax that the `regex` library and
Rust share: without look-around and back-references. Borders of words are written as signs before and behind, because
Rust is slow at `\\b` beside signs beyond ASCII.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaptionPattern:
    """A kind of fault of captions.

    Args:
        expression: Finds it in a caption without blanks around it.
        why: What it finds.
    """

    expression: str
    why: str


def _words(*phrases: str) -> str:
    """An expression for whole words, small or capital."""
    return rf"(?i)(?:^|[^a-z0-9])(?:{'|'.join(phrases)})(?:$|[^a-z0-9])"


_BLANK = r"[\p{Z}\x09-\x0d]"  # `\s` differs between the two
_ELLIPSIS = "\u2026"
_MENU_SIGNS = "|>\u00bb\u203a"
_REPEATED_LETTERS = "|".join(f"{letter}{{5,}}" for letter in "abcdefghijklmnopqrstuvwxyz")

CAPTION_PATTERNS: dict[str, CaptionPattern] = {
    "one or two words": CaptionPattern(
        rf"^[!-~]+(?:{_BLANK}+[!-~]+)?$", "completeness; in ASCII, since other scripts may not part words by blanks"
    ),
    "a cut end": CaptionPattern(
        rf"(?i)(?:\.\.|{_ELLIPSIS}|[,\-&/(+:]|{_BLANK}(?:a|an|and|at|by|for|from|in|of|on|or|the|to|with))$",
        "completeness; it ends in dots, an opening sign or a word that needs another",
    ),
    "long words": CaptionPattern(r"[!-~]{31,}", "readability; addresses, keys and texts without blanks"),
    "capitals alone": CaptionPattern(
        r"^(?:[^\p{Lu}\p{Ll}\p{Lo}]*\p{Lu}){12}[^\p{Ll}\p{Lo}]*$", "readability; headlines and lists of parts"
    ),
    "gibberish": CaptionPattern(
        rf"(?i)[bcdfghjklmnpqrstvwxz]{{7,}}|{_REPEATED_LETTERS}|"
        r"(?:img|dsc|dscn|pxl|mvi)[_-]?[0-9]{3,}|[0-9a-f]{16,}",
        "runs of consonants or of one letter, names of camera files, hexadecimal numbers",
    ),
    "boilerplate": CaptionPattern(
        _words(
            *("access denied", "add to (?:cart|basket)", "all rights reserved", "click (?:here|to)", "cookie policy"),
            *("error [0-9]+", "enable javascript", "forgot password", "free shipping", "internal server error"),
            *("log ?in", "no results found", "page not found", "privacy policy", "read more", "sign (?:in|up)"),
            *("skip to content", "subscribe", "terms (?:and|&) conditions", "terms of (?:service|use)", "view all"),
        )
        + rf"|(?:[{_MENU_SIGNS}][^{_MENU_SIGNS}]*){{3}}",
        "phrases of shops, menus and error messages, and three or more signs that part the entries of a menu",
    ),
    "offensive words": CaptionPattern(
        _words(
            *("assholes?", "bastards?", "bitch(?:es)?", "blowjobs?", "bullshit", "cocksuckers?", "cumshots?"),
            *("cunts?", "dickheads?", "fuck(?:ed|er|ers|ing|s)?", "gangbangs?", "hentai", "milfs?", "motherfuckers?"),
            *("porn", "porno", "pornography", "shit(?:s|ty)?", "sluts?", "whores?", "xxx"),
        ),
        "a short list; a table of one's own may hold another, for other languages",
    ),
    "placeholders": CaptionPattern(
        _words(
            *("lorem ipsum", "dolor sit amet", "placeholder", "your (?:ad|logo|text|image) here", "coming soon"),
            *("(?:insert|enter) (?:text|title|caption|image)(?: here)?", "default (?:image|title|caption)"),
            *("no (?:image|photo|picture)(?: is)?(?: yet)? available", "image (?:is )?(?:not|un)[ -]?available"),
            *("alt(?:ernative)? text", "untitled(?: document| design)?", "undefined", "null"),
        )
        + r"|^(?:image|photo|picture|figure|slide|screenshot|test)[ _#.\-]*[0-9]*$",
        "texts that stand where a caption was to come",
    ),
    "source code": CaptionPattern(
        r"(?i)</?[a-z][a-z0-9]*(?: [^<>]*)?/?>|&(?:amp|gt|lt|nbsp|quot|#[0-9]+);|https?://|www\.|[{}]|=>|\(\);"
        r"|function ?\(|#include|console\.log|document\.get|\$\(|<\?php|select .{1,40} from |"
        r"\.(?:jpe?g|png|gif|webp|php|html?|aspx)(?:$|[^a-z])",
        "markup, programs, addresses and file names",
    ),
}


__all__ = ["CAPTION_PATTERNS", "CaptionPattern"]

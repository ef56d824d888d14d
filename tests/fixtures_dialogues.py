"""Rows of dialogue data, good and bad. Images named `a.png` and `b.png` are there, `z.png` is not."""


def llava(*turns: str, **row) -> dict:
    names = ("human", "gpt")
    return {"conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(turns)], **row}


BAD_ROWS = {
    "no form": ({"question": "a", "answer": "b"}, "needs `conversations`, `messages`, `query`.*question, answer"),
    "no messages": ({"conversations": []}, "must be a list of messages that is not empty"),
    "a message that is none": ({"conversations": ["Hello"]}, "must be an object with `from` and `value`"),
    "unknown role": ({"messages": [{"role": "tool", "content": "a"}]}, "Unknown role 'tool'"),
    "no content": ({"messages": [{"role": "user"}]}, "must be a text or a list of parts, got None"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "must be a text or an image"),
    "two questions": (
        {"messages": [{"role": "user", "content": "a"}] * 2},
        "Message 2 is from `user`, expected `assistant`",
    ),
    "answer first": (
        {"messages": [{"role": "assistant", "content": "a"}]},
        "Message 1 is from `assistant`, expected `user`",
    ),
    "late system message": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        "Message 2 is from `system`",
    ),
    "question last": (llava("a", "b", "c"), "last message must be an answer"),
    "system message alone": ({"messages": [{"role": "system", "content": "a"}]}, "last message must be an answer"),
    "empty answer": (llava("a", " \n"), "The answer in message 2 is empty"),
    "empty question": (llava("", "a"), "The question in message 1 is empty"),
    "no response": ({"query": "a"}, "must be a text or a list of parts, got None"),
    "broken history": ({"query": "a", "response": "b", "history": [["a"]]}, "pairs of a query and a response"),
    "too few images": (llava("<image><image>", "a", image="a.png"), r"2 place\(s\) for images .* 1 image"),
    "too many images": (llava("<image>", "a", image=["a.png", "b.png"]), r"1 place\(s\) for images .* 2 image"),
    "placeholder without image": (llava("<image>", "a"), r"1 place\(s\) for images .* 0 image"),
    "null image": (llava("<image>", "a", image=[None]), "An image is null"),
    "missing image": (
        llava("<image>", "a", image="z.png"),
        "image `z.png` is missing: there is no file `.*z.png`",
    ),
    "two columns": (llava("<image>", "a", image="a.png", images=["a.png"]), "either `image` or `images`"),
    "sound": (llava("a", "b", audio="a.wav"), "`audio` is not read here"),
    "missing video": (llava("<video>", "a", video="z.mp4"), "video `z.mp4` is missing: there is no file"),
    "a video that is none": (llava("<video>", "a", video="a.png"), "video `.*a.png` cannot be read as a video"),
    "address of a video": (llava("a", "b", video="https://a.b/c.mp4"), "must be a file, its bytes, or a list"),
    "too few videos": (llava("<video><image>", "a", image="a.png"), r"1 place\(s\) for videos .* 0 video"),
    "image in an answer": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]},
            ]
        },
        "Message 2 is from `assistant` and holds an image",
    ),
}

"""A reward where grading is not the point: its process starts in a tenth of the time that computer algebra needs."""


def grade(completion: str, gold: str) -> bool:
    return completion.endswith(f"{{{gold}}}")

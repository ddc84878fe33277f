"""Plain words for names of tasks, measures and baselines, for readers who have not seen the system."""

from __future__ import annotations

TASKS: dict[str, tuple[str, str]] = {
    "policy": ("Policy", "Told what to do and shown the scene, it says how to move."),
    "forward_dynamics": (
        "World model",
        "Shown the scene and the commands, it draws what the camera will see afterwards.",
    ),
    "inverse_dynamics": (
        "Inverse dynamics",
        "Shown a picture before and one after, it says which commands lie between.",
    ),
    "video_prediction": ("Video prediction", "Told the task and shown one frame, it draws the frames that follow."),
    "subgoal": ("Subgoal", "Told the task and shown the scene, it draws where things should be a moment later."),
    "goal_policy": ("Goal policy", "Shown the scene and a picture of the goal, it says how to move."),
    "chain": ("Chain", "It writes a plan, draws a subgoal, then moves, each step given the ones before."),
    "caption": ("Caption", "Shown a short video, it names the task that is being done."),
    "question": ("Questions", "Shown a short video and a question, it answers."),
    "plan": ("Plan", "Told the task and shown the scene, it writes the steps towards it."),
    "value": ("Value", "Told the task and shown one picture, it says how much of the way is done."),
    "success": ("Success", "Told the task and shown a short video, it says whether the task is done."),
    "imitation": ("Imitation", "Shown a video of the task instead of words, it says how to move."),
    "history": ("Policy with history", "It remembers its last observations and commands while it moves."),
    "language": ("Language", "How well it predicts the task texts alone."),
    "vision_tokenizer": ("Vision tokenizer", "What is left of a picture once it has been turned into tokens and back."),
    "action_tokenizer": ("Action tokenizer", "What is lost when commands are rounded to tokens."),
    "expert_tokens": ("Expert through tokens", "The scripted expert with its commands rounded to tokens: the ceiling."),
    "closed_loop": ("Closed loop", "The policy controls the robot until it succeeds or runs out of time."),
}

MEASURES: dict[str, str] = {
    "psnr": "likeness of the picture",
    "moving_psnr": "likeness of what moves",
    "state_error": "error of the state read off the picture",
    "state_found": "last pictures with the robot in its place",
    "psnr_robot": "likeness of the picture, robot",
    "action_error": "error of the commands",
    "proprio_error": "error of the robot's state",
    "accuracy": "right answers",
    "plan_accuracy": "plans that are right",
    "text_accuracy": "texts that are right",
    "answer_accuracy": "answers that are right",
    "rank_correlation": "agreement with the order in time",
    "bits_per_token": "surprise per token",
    "codebook_use": "codes in use",
    "success": "episodes that succeed",
    "success_rate": "episodes that succeed",
}

BASELINES: dict[str, str] = {
    "repeat_last_frame": "repeating the last frame",
    "background": "the picture without what moves",
    "shuffled_actions": "same model, another sample's actions",
    "tokenizer_ceiling": "ceiling: what the tokenizer can draw",
    "true_frame": "ceiling: what is read in the true picture",
    "mean_frame": "the mean picture",
    "mean_action": "the mean command",
    "median_action": "the median command",
    "mean_proprio": "the mean state",
    "median_proprio": "the median state",
    "majority_text": "the most frequent text",
    "majority_plan": "the most frequent plan",
    "majority_answer": "the most frequent answer",
    "blanked_images": "same model, pictures blanked",
    "random": "random commands",
    "constant": "a constant",
    "unigram": "token frequencies alone",
    "one_code": "a single code",
}

CONTROLLERS: dict[str, str] = {"policy": "model", "blanked_images": "model, pictures blanked"}

MARKS = ("_over_", "_of_ceiling", "_of_reader")  # of further baselines, at the end of a measure's name
CEILINGS = ("tokenizer_ceiling", "true_frame")  # to be approached, not beaten


def task_title(name: str) -> str:
    title = TASKS.get(name, (name.replace("_", " "), ""))[0]
    return title[:1].upper() + title[1:]


def task_sentence(name: str) -> str:
    return TASKS.get(name, ("", ""))[1]


def stem(measure: str) -> str:
    """A measure without the suffix that names a further baseline."""
    for mark in MARKS:
        measure = measure.split(mark)[0]
    return measure


def measure_words(measure: str) -> str:
    """`psnr_human_over_shuffled` -> words; what is not known is shown as it is."""
    measure, _, part = stem(measure).partition(".")
    if part:
        return f"{measure_words(measure)}: {part}"
    human = measure.endswith("_human")
    bare = measure.removesuffix("_human")
    words = MEASURES.get(bare)
    if words is None and bare.startswith("error_"):
        words = f"rounding error of {bare.removeprefix('error_')}"
    return (words or bare.replace("_", " ")) + (", human video" if human else "")


def baseline_words(name: str) -> str:
    return BASELINES.get(name, name.replace("_", " "))


def split_name(name: str) -> tuple[str, str]:
    task, _, measure = name.partition(".")
    return task, measure or "value"


def task_of(key: str) -> str:
    """The task of a key of the media: `chain.plan` and `caption_human` -> `chain`, `caption`."""
    return key.split(".")[0].removesuffix("_human")


def key_title(key: str) -> str:
    part = f" ({key.split('.', 1)[1]})" if "." in key else ""
    human = ", human video" if key.split(".")[0].endswith("_human") else ""
    return task_title(task_of(key)) + part + human

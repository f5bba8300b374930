"""What a person at a terminal types and sees."""

FINISHED, FAILED, WRONG_INPUT, STOPPED = 0, 1, 2, 130  # exit statuses

"""Does a merge show in the training loss? By how much the loss jumps there, and how much of that other runs show on the same samples without a merge."""
import statistics

WINDOW = 10  # steps
# Keys that decide which samples a step has.
SAMPLES = ("data.train", "data.layout", "data.shuffle", "data.pad_id", "train.seed", "train.seq_len", "train.batch")


def jump_at(losses, step, window):
    """By how much the loss is higher in the steps after a merge than in as many before, and what it does right before and after that taken off.
    losses: {step: loss}. None where one is missing."""
    def rise(at):  # a line says the loss before its update, which comes before the merge
        after, before = ([losses.get(line) for line in range(begin, begin + window)] for begin in (at + 2, at + 2 - window))
        return None if None in after + before else statistics.fmean(after) - statistics.fmean(before)

    rises = [rise(at) for at in (step, step - 2 * window, step + 2 * window)]
    return None if None in rises else rises[0] - (rises[1] + rises[2]) / 2


class MergeJumps:
    """The jumps of one run. Merges without all the steps that a jump is made of, as the first, are left out, and so are those closer than four steps."""

    def __init__(self, steps, merges, samples):
        """steps: lines of metrics.jsonl; merges: steps; samples: equal for runs that have the same samples in every step."""
        self.losses = {step["step"]: step["loss"] for step in steps if step["loss"] is not None}
        self.merges, self.samples = merges, samples
        last = max(self.losses, default=0)
        windows = {step: min(WINDOW, (step - before) // 4, (after - step) // 4) for before, step, after in zip([0, *merges], merges, [*merges[1:], last])}
        jumps = {step: (window, jump_at(self.losses, step, window)) for step, window in windows.items() if window > 0}
        self.at = {step: (window, jump) for step, (window, jump) in jumps.items() if jump is not None}

    def plain(self):
        return [jump for _, jump in self.at.values()]

    def quiet(self, step, window):
        """No merge of this run is near enough to count."""
        return all(abs(merge - step) > 3 * window for merge in self.merges)

    def net(self, others):
        """The jumps less the mean of what others have at the same steps, those with the same samples and no merge near; None unless there is one for every jump."""
        differences = []
        for step, (window, jump) in self.at.items():
            beside = [jump_at(other.losses, step, window) for other in others if other.samples == self.samples and other.quiet(step, window)]
            beside = [value for value in beside if value is not None]
            if not beside:
                return None
            differences.append(jump - statistics.fmean(beside))
        return differences

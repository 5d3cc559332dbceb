/* The passes over every weight, for CPUs. The compiler vectorises the loops; without one NumPy does the same
   (keys.py, masks.py). */

#include <stdint.h>

enum { MAGNITUDE = 0x7fffffff, BLOCK = 32 };

/* Count the keys below `low`; write those from `low` to `last`, and their places from `first` on. Sign bits do not count.
   `held` is how many were written before; it becomes more than `room` where a block might not find room. */
int64_t split(const int32_t *keys, int64_t n, int32_t low, int32_t last, int64_t first, int32_t *inside,
              int64_t *places, int64_t room, int64_t *held)
{
    int64_t below = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        const int64_t end = start + BLOCK < n ? start + BLOCK : n;
        int32_t less = 0, more = 0;
        for (int64_t i = start; i < end; i++) {
            const int32_t key = keys[i] & MAGNITUDE;
            less += key < low;
            more += key > last;
        }
        below += less;
        if (less + more == end - start)
            continue;
        if (*held + end - start > room) {
            *held = room + 1;
            return below;
        }
        for (int64_t i = start; i < end; i++) {
            const int32_t key = keys[i] & MAGNITUDE;
            inside[*held] = key;
            places[*held] = first + i;
            *held += (key >= low) & (key <= last);
        }
    }
    return below;
}

/* Add to the count of each bin the keys whose bits from `shift` on, less `low`, are its number. */
void histogram(const int32_t *keys, int64_t n, int32_t low, int32_t shift, int64_t bins, int64_t *counts)
{
    for (int64_t i = 0; i < n; i++) {
        const int64_t bin = ((int64_t)keys[i] - low) >> shift;
        if (bin >= 0 && bin < bins)
            counts[bin]++;
    }
}

/* Mark as pruned what has a key below `bound`; return how many keys are above `highest`. Sign bits do not count. */
int64_t prune_below(int8_t *mask, const int32_t *keys, int64_t n, int32_t bound, int32_t highest)
{
    int64_t above = 0;
    for (int64_t i = 0; i < n; i++) {
        const int32_t key = keys[i] & MAGNITUDE;
        mask[i] &= -(key >= bound);
        above += key > highest;
    }
    return above;
}

void apply_mask_32(int32_t *values, const int8_t *mask, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        values[i] &= mask[i];
}

void apply_mask_16(int16_t *values, const int8_t *mask, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        values[i] &= mask[i];
}

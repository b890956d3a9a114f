//! The slots of a table: the processes that use it.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::bitmap;
use super::raw_lock::OWNER;
use crate::base::error::{Error, ErrorKind, Result};
use crate::base::holder_record;
use crate::base::owner::Owner;
use crate::sys::failpoint::step;
use crate::sys::fork::ProcessId;
use crate::sys::layout::{SLOTS, Shape, Slot, Table};
use crate::sys::ofd;

/// An owner in a lock word: the lower bits are the number of its slot, from 1 on, and the upper
/// bits the slot's generation.
pub(super) const SLOT_BITS: u32 = 12;
pub(super) const SLOT: u32 = (1 << SLOT_BITS) - 1;
pub(super) const GENERATION: u32 = OWNER >> SLOT_BITS;
/// An owner that died and whose slot is no longer known.
const UNKNOWN_DEAD: u32 = SLOT;
const _: () = assert!(SLOTS < UNKNOWN_DEAD);

/// Takes a slot that no live process has, with `file`, and records this process in it. Returns the
/// owner number, with the fork generation for which it is valid in the upper half.
pub(super) fn take_slot(table: &Table, path: &Path, file: &File) -> Result<u64> {
    let fork = u64::from(ProcessId::current().number()) << 32;
    let start = table.header().next_slot.0.fetch_add(1, Ordering::Relaxed) % SLOTS;
    for at in (start..SLOTS).chain(0..start) {
        let (offset, length) = Shape::slot(at);
        if !ofd::try_lock(file, offset).map_err(|error| Error::io("lock a slot of", path, error))? {
            continue;
        }
        step("slot locked");
        // A process may have been killed between its change of the bitmap and that of the count.
        // The next caller that needs the count recounts, so that a large table opens as fast as a
        // small one.
        table
            .header()
            .count_state
            .store(bitmap::MAY_BE_STALE, Ordering::SeqCst);
        reserve(file, (offset.into(), length.into()))
            .map_err(|error| Error::io("make room in", path, error))?;
        step("room for the slot reserved");
        let slot = &table.slots()[at as usize];
        // Only the process that has the slot changes its generation.
        let generation = slot.generation.load(Ordering::Acquire).wrapping_add(1);
        if generation & GENERATION == 0 {
            // This comes first, so that after a kill in between the next user of the slot does it.
            reset_owners_of_slot(table, at);
            step("owners of the slot reset");
        }
        slot.generation.store(generation, Ordering::Release);
        // No reader may find parts of the new record under the old generation.
        fence(Ordering::SeqCst);
        let generation = generation & GENERATION;
        step("generation raised");
        holder_record::record_current(&slot.record);
        return Ok(fork | u64::from(generation << SLOT_BITS | (at + 1)));
    }
    Err(ErrorKind::TooManyProcesses {
        table: format!("the lock table {}", path.display()),
        most: SLOTS,
    }
    .into())
}

/// Resets the owners of a slot whose generations wrap around, which happens once in 131,072 uses of
/// the slot. Locks that a dead user of the slot still holds must not count as the new user's. So
/// their owner becomes [`UNKNOWN_DEAD`].
#[cold]
fn reset_owners_of_slot(table: &Table, slot: u32) {
    for cell in table.used_cells().flat_map(|(_, cells)| cells) {
        let _ = cell
            .word
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |word| {
                (word & SLOT == slot + 1).then_some(word & !OWNER | UNKNOWN_DEAD)
            });
    }
}

/// Reserves room in the file system for a range of bytes. A file system that cannot reserve
/// allocates room at the first use.
pub(super) fn reserve(file: &File, (offset, length): (u64, u64)) -> std::result::Result<(), Errno> {
    match rustix::io::retry_on_intr(|| fallocate(file, FallocateFlags::KEEP_SIZE, offset, length)) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        result => result,
    }
}

/// Returns the slot that an owner names, or `None` if a damaged word names no slot.
fn slot_of(table: &Table, owner: u32) -> Option<&Slot> {
    table.slots().get((owner & SLOT).checked_sub(1)? as usize)
}

/// Returns whether the slot of this owner still has the owner's generation. A later generation
/// shows that the owner has died.
pub(super) fn has_generation_of(table: &Table, owner: u32) -> bool {
    slot_of(table, owner).is_some_and(|slot| is_generation_of(slot, owner))
}

fn is_generation_of(slot: &Slot, owner: u32) -> bool {
    slot.generation.load(Ordering::Acquire) & GENERATION == owner >> SLOT_BITS
}

/// Returns the offset of the byte that this owner's process keeps locked.
pub(super) fn byte_of(owner: u32) -> u32 {
    Shape::slot((owner & SLOT).wrapping_sub(1)).0
}

/// Returns the identity of a live or dead owner, as long as its slot has its record.
pub(super) fn owner_in(table: &Table, owner: u32) -> Option<Owner> {
    let slot = slot_of(table, owner)?;
    let is_same = || is_generation_of(slot, owner);
    // The generation changes before the record does.
    is_same()
        .then(|| holder_record::holder(&slot.record))
        .flatten()
        .filter(|_| is_same())
}

//! To come.
pub(super) struct FileStore;

//! A wall clock for the servers of drills.

use std::path::PathBuf;
use std::process::Command;

/// A wall clock that a drill steps, for the programs that are started with its
/// [`variables`](Self::variables).
#[derive(Debug)]
pub struct Clock(tempfile::TempDir);

impl Clock {
    /// Creates a clock that shows the real time.
    ///
    /// # Errors
    /// If there is no compiler for C.
    pub fn new() -> Result<Self, String> {
        let compiler = crate::servers::installed(&["cc", "gcc", "clang"])?;
        let clock = Self(tempfile::tempdir().expect("a directory"));
        // Servers that run as other users read it, too.
        std::fs::set_permissions(
            &clock.0,
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )
        .expect("a directory");
        std::fs::write(clock.file("clock.c"), include_str!("clock.c")).expect("room");
        std::fs::write(clock.file("ahead"), 0_i64.to_ne_bytes()).expect("room");
        let mut compile = Command::new(compiler);
        compile
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .args([clock.file("clock.so"), clock.file("clock.c")]);
        match compile.status().is_ok_and(|status| status.success()) {
            true => Ok(clock),
            false => Err("what steps a clock cannot be compiled here".to_owned()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Sets the clock this many seconds ahead of the real time from now on.
    pub fn set(&self, seconds: i64) {
        // The write is in place, because the file is mapped.
        let file = std::fs::File::options()
            .write(true)
            .open(self.file("ahead"))
            .expect("it is there");
        std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_ne_bytes(), 0).expect("room");
    }

    /// Returns the environment variables of a program that uses this clock.
    pub fn variables(&self) -> [(&'static str, PathBuf); 2] {
        [
            ("LD_PRELOAD", self.file("clock.so")),
            ("LOCKKIT_CLOCK", self.file("ahead")),
        ]
    }
}

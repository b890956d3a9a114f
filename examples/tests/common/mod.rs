//! What the tests of examples share.

use std::path::PathBuf;

/// The example `name`: test programs stand in `target/<profile>/deps`, examples in `target/<profile>/examples`.
pub(crate) fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let file = format!("{name}{}", std::env::consts::EXE_SUFFIX);
    let mut examples = test.ancestors().map(|folder| folder.join("examples").join(&file));
    examples.find(|path| path.is_file()).unwrap_or_else(|| panic!("cargo build --example {name}"))
}

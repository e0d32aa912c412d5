// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Users by number, or by a name of `/etc/passwd`.

/// The number of a user. `None` if nobody is called so: other directories of users are not asked, so that a policy means the
/// same when they cannot be reached.
pub fn number(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let table = std::fs::read_to_string("/etc/passwd").ok()?;
    let mut found = table.lines().filter_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1).and_then(|uid| uid.parse().ok())).flatten()
    });
    found.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_a_number_or_a_name_that_is_known() {
        assert_eq!(number("1000"), Some(1000));
        assert_eq!(number("root"), Some(0));
        assert_eq!(number("nobody calls himself so"), None);
    }
}

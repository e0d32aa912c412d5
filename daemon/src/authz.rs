// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Who may come in, by the name that a certificate gives (QEMU's `authz-simple` and `authz-list`).

/// A rule for identities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Authz {
    /// One identity.
    Simple(String),
    /// The first rule that matches decides, or else `otherwise`.
    List {
        /// In order.
        rules: Vec<Rule>,
        /// Whether those whom no rule matches may come in.
        otherwise: bool,
    },
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The identity, or a pattern for it.
    pub pattern: String,
    /// Whether `*` and `?` in the pattern stand for any text and any character.
    pub glob: bool,
    /// Whether those whom it matches may come in.
    pub allow: bool,
}

impl Authz {
    /// Whether `identity` may come in.
    pub fn allows(&self, identity: &str) -> bool {
        match self {
            Authz::Simple(one) => one == identity,
            Authz::List { rules, otherwise } => {
                rules.iter().find(|rule| rule.matches(identity)).map_or(*otherwise, |rule| rule.allow)
            }
        }
    }
}

impl Rule {
    fn matches(&self, identity: &str) -> bool {
        if self.glob { glob(&self.pattern, identity) } else { self.pattern == identity }
    }
}

/// Whether the whole text matches: two places to go back to at most, so no pattern takes long.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut here) = (0, 0);
    // Behind the last star, and how much of the text that star has taken.
    let mut star: Option<(usize, usize)> = None;
    while here < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at + 1, here));
                at += 1;
            }
            Some(&char) if char == '?' || char == text[here] => {
                at += 1;
                here += 1;
            }
            _ => {
                let Some((behind, taken)) = star else { return false };
                star = Some((behind, taken + 1));
                (at, here) = (behind, taken + 1);
            }
        }
    }
    pattern[at..].iter().all(|&char| char == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_matches_decides() {
        let rule = |pattern: &str, glob, allow| Rule { pattern: pattern.into(), glob, allow };
        let rules = vec![rule("CN=bob,O=x", false, false), rule("CN=*,O=x", true, true)];
        let list = Authz::List { rules, otherwise: false };
        assert!(list.allows("CN=alice,O=x"));
        assert!(!list.allows("CN=bob,O=x") && !list.allows("CN=alice,O=y") && !list.allows(""));
        assert!(Authz::List { rules: Vec::new(), otherwise: true }.allows("anybody"));
    }

    #[test]
    fn stars_and_question_marks_match_what_they_should() {
        for (pattern, text, wanted) in [
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-b-b-d", false),
            ("?", "", false),
            ("a?", "ab", true),
            ("**a", "bba", true),
            ("a", "ab", false),
        ] {
            assert_eq!(glob(pattern, text), wanted, "{pattern} {text}");
        }
    }
}

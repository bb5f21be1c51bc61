//! A shell's lines, as far as pages need them: words, quotes, comments, continued lines, pipes and lists.

/// The commands of a text, each as its words; pipes and lists are cut. Quotes that never end are an error.
pub(super) fn commands(text: &str) -> Result<Vec<Vec<String>>, String> {
    let (mut commands, mut words, mut word) = (Vec::new(), Vec::new(), None::<String>);
    let (mut quote, mut depth) = (None, 0_u32);
    let mut characters = text.chars().peekable();
    while let Some(c) = characters.next() {
        let into = |word: &mut Option<String>| word.get_or_insert_with(String::new).push(c);
        match (quote, c) {
            (Some(open), _) if c == open => {
                quote = None;
                if depth > 0 {
                    into(&mut word);
                }
            }
            (Some('"'), '\\') if depth == 0 => word.get_or_insert_with(String::new).extend(characters.next()),
            (Some(_), _) => into(&mut word),
            (None, '\'' | '"') => {
                quote = Some(c);
                match depth {
                    0 => drop(word.get_or_insert_with(String::new)),
                    _ => into(&mut word),
                }
            }
            (None, '$') if characters.peek() == Some(&'(') => {
                depth += 1;
                into(&mut word);
            }
            (None, ')') if depth > 0 => {
                depth -= 1;
                into(&mut word);
            }
            (None, _) if depth > 0 => into(&mut word),
            (None, '\\') => match characters.next() {
                Some('\n') | None => {}
                Some(next) => word.get_or_insert_with(String::new).push(next),
            },
            (None, '#') if word.is_none() => while characters.next_if(|next| *next != '\n').is_some() {},
            (None, '|' | ';' | '\n' | '&') => {
                words.extend(word.take());
                commands.push(std::mem::take(&mut words));
            }
            (None, _) if c.is_whitespace() => words.extend(word.take()),
            (None, _) => into(&mut word),
        }
    }
    words.extend(word);
    commands.push(words);
    commands.retain(|words| !words.is_empty());
    if quote.is_some() || depth > 0 { Err(format!("quotes do not match: {text}")) } else { Ok(commands) }
}

#[test]
fn cuts_lines_as_a_shell_does() {
    let cut = |text: &str| commands(text).unwrap().iter().map(|words| words.join("|")).collect::<Vec<_>>();
    assert_eq!(cut("a 'b c' \"d $(e 'f') g\" # h\ni \\\n  j"), ["a|b c|d $(e 'f') g", "i|j"]);
    assert_eq!(cut("a | b 'c | d'; e && f"), ["a", "b|c | d", "e", "f"]);
    assert_eq!(cut("sql x \"SELECT 'y'\n  FROM z\""), ["sql|x|SELECT 'y'\n  FROM z"]);
    assert!(commands("a 'b").is_err());
}

BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0005');
CREATE TABLE base (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	source TEXT NOT NULL, 
	layout TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_base PRIMARY KEY (id), 
	CONSTRAINT uq_base_name UNIQUE (name)
);
INSERT INTO "base" VALUES(1,'small','/models/small','sd1','ffffffff','2026-11-29T19:44:38.351636+00:00');
INSERT INTO "base" VALUES(2,'large','/models/large','sdxl','eeeeeeee','2026-11-29T19:44:38.433786+00:00');
CREATE TABLE concept (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	definition TEXT NOT NULL, 
	added_at TEXT NOT NULL, 
	CONSTRAINT pk_concept PRIMARY KEY (id), 
	CONSTRAINT uq_concept_name UNIQUE (name)
);
INSERT INTO "concept" VALUES(1,'apple','object','{"anchor": "pear", "kind": "object", "name": "apple", "synonyms": []}','2026-11-29T19:44:38.395329+00:00');
INSERT INTO "concept" VALUES(2,'Äpfel & ''Birnen''','style','{"anchor": "\u4e00\u679a\u306e\u7d75", "kind": "style", "name": "\u00c4pfel & ''Birnen''", "synonyms": ["Pomologie", "fruit; still life"]}','2026-11-29T19:44:38.466788+00:00');
CREATE TABLE evaluation (
	id INTEGER NOT NULL, 
	patch_id TEXT, 
	recipe_id INTEGER, 
	revision INTEGER, 
	digest TEXT NOT NULL, 
	suite TEXT NOT NULL, 
	judge TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	settings TEXT NOT NULL, 
	versions TEXT NOT NULL, 
	seconds DOUBLE NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_evaluation PRIMARY KEY (id), 
	CONSTRAINT ck_evaluation_subject CHECK ((patch_id IS NULL) <> (recipe_id IS NULL)), 
	CONSTRAINT ck_evaluation_revision CHECK ((recipe_id IS NULL) = (revision IS NULL)), 
	CONSTRAINT fk_evaluation_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id), 
	CONSTRAINT fk_evaluation_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
CREATE TABLE evaluation_result (
	evaluation_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	subject TEXT NOT NULL, 
	metric TEXT NOT NULL, 
	value DOUBLE NOT NULL, 
	low DOUBLE, 
	high DOUBLE, 
	n INTEGER NOT NULL, 
	CONSTRAINT pk_evaluation_result PRIMARY KEY (evaluation_id, number), 
	CONSTRAINT fk_evaluation_result_evaluation_id_evaluation FOREIGN KEY(evaluation_id) REFERENCES evaluation (id)
);
CREATE TABLE kept_prompt (
	base_id INTEGER NOT NULL, 
	prompt TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_kept_prompt PRIMARY KEY (base_id, prompt), 
	CONSTRAINT fk_kept_prompt_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
CREATE TABLE patch (
	id TEXT NOT NULL, 
	concept_id INTEGER NOT NULL, 
	base_id INTEGER NOT NULL, 
	solver TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	settings TEXT NOT NULL, 
	seed BIGINT NOT NULL, 
	nbytes BIGINT NOT NULL, 
	blob TEXT NOT NULL, 
	seconds DOUBLE NOT NULL, 
	solved_at TEXT NOT NULL, 
	CONSTRAINT pk_patch PRIMARY KEY (id), 
	CONSTRAINT fk_patch_concept_id_concept FOREIGN KEY(concept_id) REFERENCES concept (id), 
	CONSTRAINT fk_patch_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "patch" VALUES('7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1,1,'uce','text map','{"lambda": 0.1}',7,3,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',0.5,'2026-11-29T19:44:38.484886+00:00');
INSERT INTO "patch" VALUES('3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',2,1,'uce','text map','{"lambda": 0.1}',7,3,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5,'2026-11-29T19:44:38.680368+00:00');
INSERT INTO "patch" VALUES('8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1,1,'uce','text map','{"lambda": 0.1}',7,5,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',0.5,'2026-11-29T19:44:38.772180+00:00');
CREATE TABLE patch_tag (
	patch_id TEXT NOT NULL, 
	tag TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_patch_tag PRIMARY KEY (patch_id, tag), 
	CONSTRAINT fk_patch_tag_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
CREATE TABLE patch_text (
	id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	text TEXT NOT NULL, 
	CONSTRAINT pk_patch_text PRIMARY KEY (id), 
	CONSTRAINT uq_patch_text_patch_id UNIQUE (patch_id), 
	CONSTRAINT fk_patch_text_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "patch_text" VALUES(1,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed','
apple
pear
object
text map
uce
small
object
uce
1
');
INSERT INTO "patch_text" VALUES(2,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3','
äpfel & ''birnen''
pomologie
fruit; still life
一枚の絵
style
text map
uce
small
style
uce
1
');
INSERT INTO "patch_text" VALUES(3,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f','
apple
pear
object
text map
uce
small
object
uce
1
');
CREATE TABLE "recipe" (
	id INTEGER NOT NULL, 
	name TEXT NOT NULL, 
	base_id INTEGER NOT NULL, 
	created_at TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	deleted_at TEXT, 
	CONSTRAINT pk_recipe PRIMARY KEY (id), 
	CONSTRAINT fk_recipe_base_id_base FOREIGN KEY(base_id) REFERENCES base (id)
);
INSERT INTO "recipe" VALUES(1,'safe',1,'2026-11-29T19:44:38.902709+00:00',5,NULL);
INSERT INTO "recipe" VALUES(2,'empty',2,'2026-11-29T19:44:38.995874+00:00',0,NULL);
CREATE TABLE recipe_patch (
	recipe_id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength DOUBLE NOT NULL, until DATE, 
	CONSTRAINT pk_recipe_patch PRIMARY KEY (recipe_id, patch_id), 
	CONSTRAINT fk_recipe_patch_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id), 
	CONSTRAINT fk_recipe_patch_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "recipe_patch" VALUES(1,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',0.5,NULL);
INSERT INTO "recipe_patch" VALUES(1,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',1.0,NULL);
CREATE TABLE recipe_tag (
	recipe_id INTEGER NOT NULL, 
	tag TEXT NOT NULL, 
	revision INTEGER NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	CONSTRAINT pk_recipe_tag PRIMARY KEY (recipe_id, tag), 
	CONSTRAINT fk_recipe_tag_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
CREATE TABLE recipe_text (
	id INTEGER NOT NULL, 
	recipe_id INTEGER NOT NULL, 
	revision INTEGER NOT NULL, 
	text TEXT NOT NULL, 
	CONSTRAINT pk_recipe_text PRIMARY KEY (id), 
	CONSTRAINT uq_recipe_text_recipe_id_revision UNIQUE (recipe_id, revision), 
	CONSTRAINT fk_recipe_text_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
INSERT INTO "recipe_text" VALUES(1,1,0,'
safe
small
');
INSERT INTO "recipe_text" VALUES(2,2,0,'
empty
large
');
INSERT INTO "recipe_text" VALUES(3,1,1,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(4,1,2,'
übung: two
in two lines
');
INSERT INTO "recipe_text" VALUES(5,1,3,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(6,1,4,'
übung: one
in two lines
');
INSERT INTO "recipe_text" VALUES(7,1,5,'
übung: three
in two lines
');
CREATE TABLE revision (
	id INTEGER NOT NULL, 
	recipe_id INTEGER NOT NULL, 
	number INTEGER NOT NULL, 
	action TEXT NOT NULL, 
	source TEXT, 
	why TEXT NOT NULL, 
	who TEXT NOT NULL, 
	at TEXT NOT NULL, 
	digest_before TEXT, 
	digest_after TEXT, 
	CONSTRAINT pk_revision PRIMARY KEY (id), 
	CONSTRAINT uq_revision_recipe_id_number UNIQUE (recipe_id, number), 
	CONSTRAINT ck_revision_action CHECK (action IN ('add', 'remove', 'strength', 'until', 'checkout', 'copy', 'delete', 'undelete')), 
	CONSTRAINT fk_revision_recipe_id_recipe FOREIGN KEY(recipe_id) REFERENCES recipe (id)
);
INSERT INTO "revision" VALUES(1,1,1,'add',NULL,'Übung: one
in two lines','tester','2026-11-29T19:44:39.119655+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(2,1,2,'add',NULL,'Übung: two
in two lines','tester','2026-11-29T19:44:39.184222+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(3,1,3,'strength',NULL,'Übung: one
in two lines','tester','2026-11-29T19:44:39.245806+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(4,1,4,'remove',NULL,'Übung: one
in two lines','tester','2026-11-29T19:44:39.315405+00:00',NULL,NULL);
INSERT INTO "revision" VALUES(5,1,5,'add',NULL,'Übung: three
in two lines','tester','2026-11-29T19:44:39.379488+00:00',NULL,NULL);
CREATE TABLE revision_patch (
	revision_id INTEGER NOT NULL, 
	patch_id TEXT NOT NULL, 
	strength_before DOUBLE, 
	strength_after DOUBLE, 
	until_before DATE, 
	until_after DATE, 
	CONSTRAINT pk_revision_patch PRIMARY KEY (revision_id, patch_id), 
	CONSTRAINT fk_revision_patch_revision_id_revision FOREIGN KEY(revision_id) REFERENCES revision (id), 
	CONSTRAINT fk_revision_patch_patch_id_patch FOREIGN KEY(patch_id) REFERENCES patch (id)
);
INSERT INTO "revision_patch" VALUES(1,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',NULL,1.0,NULL,NULL);
INSERT INTO "revision_patch" VALUES(2,'3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3',NULL,0.5,NULL,NULL);
INSERT INTO "revision_patch" VALUES(3,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',1.0,2.0,NULL,NULL);
INSERT INTO "revision_patch" VALUES(4,'7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed',2.0,NULL,NULL,NULL);
INSERT INTO "revision_patch" VALUES(5,'8b5b9db0c13db24256c829aa364aa90c6d2eba318b9232a4ab9313b954d3555f',NULL,1.0,NULL,NULL);
CREATE INDEX ix_recipe_patch_patch_id ON recipe_patch (patch_id);
CREATE UNIQUE INDEX uq_recipe_name ON recipe (name) WHERE deleted_at IS NULL;
CREATE INDEX ix_revision_patch_patch_id ON revision_patch (patch_id);
CREATE INDEX ix_recipe_patch_until ON recipe_patch (until);
CREATE INDEX ix_patch_tag_tag ON patch_tag (tag);
CREATE INDEX ix_recipe_tag_tag ON recipe_tag (tag);
CREATE INDEX ix_patch_solved_at_id ON patch (solved_at, id);
CREATE INDEX ix_patch_concept_id_solved_at_id ON patch (concept_id, solved_at, id);
CREATE INDEX ix_patch_base_id_solved_at_id ON patch (base_id, solved_at, id);
CREATE INDEX ix_patch_solver_solved_at_id ON patch (solver, solved_at, id);
CREATE INDEX ix_evaluation_patch_id_at ON evaluation (patch_id, at);
CREATE INDEX ix_evaluation_recipe_id_revision_at ON evaluation (recipe_id, revision, at);
CREATE VIRTUAL TABLE patch_pieces USING fts5(
        text, content='patch_text', content_rowid='id', tokenize='trigram case_sensitive 1', detail='none'
    );
CREATE TRIGGER patch_text_added AFTER INSERT ON patch_text BEGIN
        INSERT INTO patch_pieces (rowid, text) VALUES (new.id, new.text);
    END;
CREATE TRIGGER patch_text_removed AFTER DELETE ON patch_text BEGIN
        INSERT INTO patch_pieces (patch_pieces, rowid, text) VALUES ('delete', old.id, old.text);
    END;
CREATE TRIGGER patch_text_changed AFTER UPDATE ON patch_text BEGIN
        INSERT INTO patch_pieces (patch_pieces, rowid, text) VALUES ('delete', old.id, old.text);
        INSERT INTO patch_pieces (rowid, text) VALUES (new.id, new.text);
    END;
INSERT INTO patch_pieces (patch_pieces) VALUES ('rebuild');
COMMIT;
